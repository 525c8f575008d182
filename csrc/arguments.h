// From tensors to the bare addresses in rows.h: checks of devices, dtypes and shapes, and allocation of results.
//
// Indices are not looked at here: they may be on a GPU.
#pragma once

#include <optional>
#include <tuple>

#include "checks.h"
#include "rows.h"

namespace fastnabla {

// The address at which code for the device of `on` reaches a slab's elements; fails if it does not reach them.
using Address = char* (*)(const char* name, const Tensor& slab, bool writes, const Tensor& on);

using Gathered = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Append append_arguments(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, int64_t step, const Tensor& x, const Tensor& output,
    const Tensor& x_next, Address address);

AppendSteps append_steps_arguments(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& slots, const Tensor& x, const Tensor& output, Address address);

std::tuple<Gather, Gathered> gather_arguments(
    const Tensor& states, const Tensor& outputs, const std::optional<Tensor>& scales, const Tensor& state_at,
    const Tensor& output_at, const Tensor& steps, const Tensor& prompt, const Tensor& reward, const Tensor& epoch,
    const Tensor& timestep, const Tensor& index, ScalarType dtype, Address address);

std::tuple<Recode<true>, Tensor, Tensor> quantise_arguments(const Tensor& x, int64_t block);

std::tuple<Recode<false>, Tensor> dequantise_arguments(
    const Tensor& q, const Tensor& scales, int64_t block, ScalarType dtype);

}  // namespace fastnabla
