"""The trajectory buffer's operations: compiled ones from csrc/ where they were built, else those of `buffer_torch`.

Shapes: N slots, S positions for states and P for outputs in a slot, K drawn steps a trajectory, T steps. `states`
`[N, S, …]` and `outputs` `[N, P, …]` are slabs of contiguous rows, of float32, float16 or bfloat16; outputs of int8
come with `scales` `[N, P, blocks]` float32, one a block of 2^k elements. `state_at` `[N, T + 1]` and `output_at`
`[N, T]` int32 say at which position a state or an output lies, −1 that it is not kept. All is on one device, but with
the rest on a GPU slabs and scales may be in pinned host memory.

On a CPU indices are checked before anything is written; errors are RuntimeErrors that name the argument. On a GPU
they are not checked, which would wait for it: check them on the host's copy of the tables. Nor does any function wait:
pinned slabs must live, and not be changed by the host, until the stream has got there.

Results are allocated here, in Python: running out of a GPU's memory raises torch.OutOfMemoryError, as elsewhere in torch.
"""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from fastnabla.trajectories import buffer_torch


def _load() -> str:
    """Why the extension is not loaded; empty if it is. FASTNABLA_EXTENSION names another file than the one here."""
    named = os.environ.get("FASTNABLA_EXTENSION")
    found = [Path(named)] if named else sorted(Path(__file__).parents[1].glob("_C*.so"))
    if not found:
        return "the extension fastnabla/_C.so is not built"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the extension {found[0]} cannot be loaded ({error.__cause__ or error})"
    return ""


WHY_NOT = _load()
"""Why the compiled operations, or those on CUDA, are not used; empty if they are."""
AVAILABLE = not WHY_NOT
"""The compiled operations are loaded."""
_ON_CUDA = ("append", "append_steps", "gather", "quantise", "dequantise")
CUDA_AVAILABLE = AVAILABLE and all(
    torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnabla::{name}", "CUDA") for name in _ON_CUDA
)
"""They include those on CUDA, whether or not there is a GPU."""

if AVAILABLE and not CUDA_AVAILABLE:
    WHY_NOT = "the extension is built without its CUDA part"
if not AVAILABLE or (WHY_NOT and torch.version.cuda):
    logging.getLogger("fastnabla").warning(
        "%s: the trajectory buffer uses slower code. To build it, install torch, a C++ compiler and for GPUs CUDA's "
        "nvcc, and run in the repository: pip install --no-build-isolation --verbose --editable .",
        WHY_NOT[0].upper() + WHY_NOT[1:],
    )


def require_cuda() -> None:
    """Fail unless the compiled operations on CUDA are registered, whether or not there is a GPU.

    Raises:
        RuntimeError: they are not. It says why, and how to build them.
    """
    if not CUDA_AVAILABLE:
        raise RuntimeError(
            f"the buffer's operations on CUDA are not registered: {WHY_NOT}. Build them in the repository, where they are "
            "required: FASTNABLA_CUDA=1 python setup.py build_ext --inplace"
        )


def append(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    slots: Tensor,
    step: int,
    x: Tensor,
    output: Tensor,
    x_next: Tensor,
) -> None:
    """Write step `step` of the trajectories in `slots` `[B]` int64, all different: `x` to state `step`, `x_next` to
    state `step + 1`, `output` to the output, each `[B, …]`, where they are kept."""
    if _compiled(x):
        x, output, x_next = x.contiguous(), output.contiguous(), x_next.contiguous()
        torch.ops.fastnabla.append.default(states, outputs, scales, state_at, output_at, slots, step, x, output, x_next)
    else:
        buffer_torch.append(states, outputs, scales, state_at, output_at, slots, step, x, output, x_next)


def append_steps(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    slots: Tensor,
    x: Tensor,
    output: Tensor,
) -> None:
    """Write the trajectories `x` `[B, T + 1, …]`, `output` `[B, T, …]` to `slots` `[B]`: what of them is kept."""
    if _compiled(x):
        x, output = x.contiguous(), output.contiguous()
        torch.ops.fastnabla.append_steps.default(states, outputs, scales, state_at, output_at, slots, x, output)
    else:
        buffer_torch.append_steps(states, outputs, scales, state_at, output_at, slots, x, output)


def gather(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    steps: Tensor,
    prompt: Tensor,
    reward: Tensor,
    epoch: Tensor,
    timestep: Tensor,
    index: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The transitions numbered `index` `[M]` int64, slot * K + position among the drawn steps, on the index's device.

    Args:
        steps: `[N, K]` int64.
        prompt, reward, epoch: by slot, `[N]`; int64, float32, int64.
        timestep: by step, `[T]` int64.
        dtype: of the states and the outputs returned.

    Returns:
        x, x_next, model_output `[M, …]`; step_index, timestep, prompt, trajectory (the slot), reward, epoch `[M]`.

    Raises:
        torch.OutOfMemoryError: the GPU has no room for them.
    """
    arguments = states, outputs, scales, state_at, output_at, steps, prompt, reward, epoch, timestep, index
    if not _compiled(index):
        return buffer_torch.gather(*arguments, dtype)
    out = gathered(index, states.shape[2:], dtype)
    torch.ops.fastnabla.gather.default(*arguments, list(out))
    return out


FIELDS = ("x", "x_next", "model_output", "step_index", "timestep", "prompt", "trajectory", "reward", "epoch")
"""What `gather` returns, by the names of `fastnabla.trajectories.transitions.Transitions`."""


def gathered(index: Tensor, row: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Room for the `FIELDS` of the transitions `index`: what `torch.ops.fastnabla.gather` writes to."""
    rows = [index.new_empty((len(index), *row), dtype=dtype) for _ in range(3)]
    numbers = [torch.int64, torch.int64, torch.int64, torch.int64, torch.float32, torch.int64]
    return (*rows, *(index.new_empty(len(index), dtype=kind) for kind in numbers))


def quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rows `[R, E]` as int8 and one scale for every `block` elements, `[R, ⌈E / block⌉]` float32.

    An element is off by at most half its scale, and rounding in float32. A block with an infinity or a NaN becomes NaN.
    """
    if not _compiled(x):
        return buffer_torch.quantise(x, block)
    rows, elements = x.shape
    q, scales = (
        x.new_empty(rows, elements, dtype=torch.int8),
        x.new_empty(rows, -(-elements // block), dtype=torch.float32),
    )
    torch.ops.fastnabla.quantise(x.contiguous(), block, q, scales)
    return q, scales


def dequantise(q: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """What `quantise` made, as `dtype`."""
    if not _compiled(q):
        return buffer_torch.dequantise(q, scales, block, dtype)
    x = q.new_empty(q.shape, dtype=dtype)
    torch.ops.fastnabla.dequantise(q.contiguous(), scales.contiguous(), block, x)
    return x


def draw_stratified(seed: int, first: int, trajectories: int, num_steps: int, strata: int) -> Tensor:
    """Steps to keep of the trajectories numbered from `first` on, `[trajectories, strata + 1]` int64: the last step
    always, then one uniform draw in each of `strata` equal parts of the trajectory.

    This is the reference implementation's low-variance subsampling. A stratum may draw the last step again. What a
    trajectory draws depends on the seed and its number only.

    Raises:
        ValueError: `strata` is not a positive divisor of `num_steps`.
    """
    if strata < 1 or num_steps % strata:
        raise ValueError(
            f"strata = {strata}: must be at least 1 and divide the number of steps, {num_steps}; "
            "change rollout.fraction or sampler.steps so that steps * fraction does."
        )
    function = torch.ops.fastnabla.draw_stratified if AVAILABLE else buffer_torch.draw_stratified
    return function(seed, first, trajectories, num_steps, strata)


def draw_uniform(seed: int, first: int, trajectories: int, num_steps: int, draws: int) -> Tensor:
    """Steps to keep, `[trajectories, draws + 1]` int64: the last, then `draws` different steps before it, in random
    order; otherwise as `draw_stratified`.

    Raises:
        ValueError: there are not `draws` steps before the last, or `draws` is not positive.
    """
    if not 1 <= draws < num_steps:
        raise ValueError(f"draws = {draws}: must be between 1 and {num_steps - 1}, the steps before the last.")
    function = torch.ops.fastnabla.draw_uniform if AVAILABLE else buffer_torch.draw_uniform
    return function(seed, first, trajectories, num_steps, draws)


def _compiled(tensor: Tensor) -> bool:
    return CUDA_AVAILABLE if tensor.is_cuda else AVAILABLE and tensor.is_cpu


def _fake_writes(*arguments: Tensor | list[Tensor] | int | None) -> None:
    """Of operations that only write to what they are given."""


def _fake_draws(seed: int, first: int, trajectories: int, num_steps: int, columns: int) -> Tensor:
    return torch.empty((trajectories, columns + 1), dtype=torch.int64)


if AVAILABLE:
    for _name in _ON_CUDA:
        torch.library.register_fake(f"fastnabla::{_name}", _fake_writes)
    for _name in ("draw_stratified", "draw_uniform"):
        torch.library.register_fake(f"fastnabla::{_name}", _fake_draws)
