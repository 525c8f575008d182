"""The trajectory buffer's operations: compiled ones from csrc/ if they are built, else those of `buffer_torch`.

Shapes: N slots with S positions for states and P for outputs, K drawn steps and T steps per trajectory. `states [N, S, …]`
and `outputs [N, P, …]` are slabs of contiguous rows, of float32, float16 or bfloat16. int8 outputs come with `scales`
`[N, P, blocks]` float32, one for each block of 2^k elements. `state_at [N, T + 1]` and `output_at [N, T]` int32 give the
position of a state or an output, −1 if it is not kept. All tensors are on one device, except that slabs and scales may be
in pinned host memory while the rest is on a GPU.

On a CPU, indices are checked before anything is written, and a RuntimeError names the argument. On a GPU they are not
checked, because that would wait for the device: check them on the host's copy of the tables. No function waits: keep
pinned slabs alive, and do not change them on the host, until the stream has passed.

Results are allocated in Python, so that a GPU without room raises torch.OutOfMemoryError, as elsewhere in torch.
"""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from fastnabla.trajectories import buffer_torch


def _load() -> str:
    """Load the extension, from FASTNABLA_EXTENSION if that is set. Returns why it failed, or an empty string."""
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
"""Whether the compiled operations are loaded."""
_OPERATIONS = ("append", "gather")
CUDA_AVAILABLE = AVAILABLE and all(
    torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnabla::{name}", "CUDA") for name in _OPERATIONS
)
"""Whether they include those on CUDA, with or without a GPU in the machine."""

if AVAILABLE and not CUDA_AVAILABLE:
    WHY_NOT = "the extension is built without its CUDA part"
if not AVAILABLE or (WHY_NOT and torch.version.cuda):
    logging.getLogger("fastnabla").warning(
        "%s: the trajectory buffer uses slower code. To build it, install torch, a C++ compiler and for GPUs CUDA's "
        "nvcc, and run in the repository: pip install --no-build-isolation --verbose --editable .",
        WHY_NOT[0].upper() + WHY_NOT[1:],
    )


def require_cuda() -> None:
    """Fail unless the compiled operations on CUDA are registered, with or without a GPU in the machine.

    Raises:
        RuntimeError: they are not registered. The message says why and how to build them.
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
    """Write step `step` of the trajectories in `slots [B]` int64, all different.

    `x [B, …]` goes to state `step`, `x_next` to state `step + 1` and `output` to the output, each only if it is kept.
    """
    if _compiled(x):
        x, output, x_next = x.contiguous(), output.contiguous(), x_next.contiguous()
        torch.ops.fastnabla.append.default(states, outputs, scales, state_at, output_at, slots, step, x, output, x_next)
    else:
        buffer_torch.append(states, outputs, scales, state_at, output_at, slots, step, x, output, x_next)


def gather(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    steps: Tensor,
    prompt: Tensor,
    reward: Tensor,
    index: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The transitions numbered `index`, on the index's device.

    Args:
        steps: `[N, K]` int64.
        prompt, reward: by slot, `[N]`; int64, float32.
        index: `[M]` int64, slot · K + position among the drawn steps.
        dtype: of the returned states and outputs.

    Returns:
        x, x_next, model_output `[M, …]`; step_index, prompt, trajectory (the slot), reward `[M]`.

    Raises:
        torch.OutOfMemoryError: the GPU has no room for them.
    """
    arguments = states, outputs, scales, state_at, output_at, steps, prompt, reward, index
    if not _compiled(index):
        return buffer_torch.gather(*arguments, dtype)
    out = gathered(index, states.shape[2:], dtype)
    torch.ops.fastnabla.gather.default(*arguments, list(out))
    return out


FIELDS = ("x", "x_next", "model_output", "step_index", "prompt", "trajectory", "reward")
"""What `gather` returns, by the names of `fastnabla.trajectories.transitions.Transitions`."""


def gathered(index: Tensor, row: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Uninitialised `FIELDS` of the transitions `index`, which `torch.ops.fastnabla.gather` writes to."""
    rows = [index.new_empty((len(index), *row), dtype=dtype) for _ in range(3)]
    numbers = [torch.int64, torch.int64, torch.int64, torch.float32]
    return (*rows, *(index.new_empty(len(index), dtype=kind) for kind in numbers))


def _compiled(tensor: Tensor) -> bool:
    return CUDA_AVAILABLE if tensor.is_cuda else AVAILABLE and tensor.is_cpu


def _fake(*arguments: Tensor | list[Tensor] | int | None) -> None:
    """The operations return nothing; they write to their arguments."""


if AVAILABLE:
    for _name in _OPERATIONS:
        torch.library.register_fake(f"fastnabla::{_name}", _fake)
