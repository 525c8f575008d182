// The operations on the CPU, as bindings.cpp registers them; those on CUDA are registered in trajectory_buffer.cu.
#pragma once

#include "arguments.h"

namespace fastnabla {

void append(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, int64_t step, const Tensor& x, const Tensor& output,
    const Tensor& x_next);

void gather(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& steps, const Tensor& prompt, const Tensor& reward, const Tensor& index,
    const std::vector<Tensor>& out);

}  // namespace fastnabla
