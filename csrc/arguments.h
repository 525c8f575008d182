// Converts tensors to the bare addresses in rows.h, after checks of devices, dtypes and shapes.
//
// Nothing is allocated here, because running out of memory in this library would not raise torch.OutOfMemoryError:
// results go to tensors that the caller allocates. Indices are not read here, because they may be on a GPU.
#pragma once

#include <optional>

#include "checks.h"
#include "rows.h"

namespace fastnabla {

// The address of a slab's elements for code that runs on the device of `on`. Fails if that device cannot reach them.
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
