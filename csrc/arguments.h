// From tensors to the bare addresses in rows.h: checks of devices, dtypes and shapes.
//
// Nothing is allocated here: results go to tensors that are given. Running out of memory is then torch's own error in
// Python, torch.OutOfMemoryError, which an allocation in this library is not. Indices are not looked at here: they may be on a GPU.
#pragma once

#include <optional>

#include "checks.h"
#include "rows.h"

namespace fastnabla {

// The address at which code for the device of `on` reaches a slab's elements; fails if it does not reach them.
using Address = char* (*)(const char* name, const Tensor& slab, bool writes, const Tensor& on);

Append append_arguments(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, int64_t step, const Tensor& x, const Tensor& output,
    const Tensor& x_next, Address address);

// `out`: x, x_next, model_output, step_index, prompt, trajectory, reward.
Gather gather_arguments(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& steps, const Tensor& prompt, const Tensor& reward, const Tensor& index,
    const std::vector<Tensor>& out, Address address);

}  // namespace fastnabla
