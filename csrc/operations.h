// The operations on the CPU, as bindings.cpp registers them; those on CUDA are registered in trajectory_buffer.cu.
#pragma once

#include "arguments.h"

namespace fastnabla {

void append(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, int64_t step, const Tensor& x, const Tensor& output,
    const Tensor& x_next);

void append_steps(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, const Tensor& x, const Tensor& output);

void gather(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& steps, const Tensor& prompt, const Tensor& reward, const Tensor& epoch,
    const Tensor& timestep, const Tensor& index, const std::vector<Tensor>& out);

void quantise(const Tensor& x, int64_t block, const Tensor& q, const Tensor& scales);

void dequantise(const Tensor& q, const Tensor& scales, int64_t block, const Tensor& x);

Tensor draw_stratified(int64_t seed, int64_t first, int64_t trajectories, int64_t num_steps, int64_t strata);

Tensor draw_uniform(int64_t seed, int64_t first, int64_t trajectories, int64_t num_steps, int64_t draws);

}  // namespace fastnabla
