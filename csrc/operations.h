// The operations on the CPU, which bindings.cpp registers. trajectory_buffer.cu registers those on CUDA.
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
