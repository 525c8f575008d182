"""How kernels are launched: layouts, argument checks, and registration as torch operations.

Tensors are contiguous or channels-last. If all tensors of a call have the same layout, a row is one run of memory (`C = 1`).
Otherwise a tile spans all channels, and each tensor is read in its own memory order.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnabla.kernels.common import NUM_COLUMNS

TILE = 1024
"""Elements per tile: 8 for each thread of four warps, which is one 16-byte access for bf16 and two for float32."""
NUM_WARPS = 4
_TABLE = (NUM_COLUMNS.value,)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("fastnabla", "FRAGMENT")


def operation(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Register a launcher as the torch operation `fastnabla::<its name>`, which torch.compile does not trace into.

    Args:
        fake: has the same signature, and returns tensors of the right shapes, dtypes and strides without computing.
        mutates: names of the arguments that are written to.
    """

    def register(launcher: Callable) -> Callable:
        name = launcher.__name__
        _LIBRARY.define(name + torch.library.infer_schema(launcher, mutates_args=mutates))
        _LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastnabla::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.fastnabla, name).default

    return register


class Layout(NamedTuple):
    """Memory layout of a call's tensors, and their cut into tiles."""

    rows: int
    size: int
    positions: int
    tiles: int
    """Tiles per row."""
    constants: dict[str, int]
    """The kernels' constants C, BLOCK_C, BLOCK_P and LAST."""
    last: dict[str, bool]
    """By tensor name: whether it is channels-last and not contiguous."""

    @property
    def grid(self) -> tuple[int]:
        """One program per tile."""
        return (self.rows * self.tiles,)

    def tile_arguments(self, table: Tensor, step_index: Tensor) -> dict[str, Any]:
        """Arguments that all kernels by tile have."""
        return {
            "table": table,
            "step_index": step_index,
            "num_steps": table.shape[0],
            "positions": self.positions,
            "num_tiles": self.tiles,
            **self.constants,
        }

    def arguments(self, table: Tensor, step_index: Tensor, guidance_scale: float | None) -> dict[str, Any]:
        """Arguments that all kernels by tile with output pairs have."""
        return {
            **self.tile_arguments(table, step_index),
            "num_rows": self.rows,
            "w": guidance_scale or 0.0,
            "GUIDED": guidance_scale is not None,
        }

    def empty(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised float32 tensor with one row per transition, row shape of `like`, and the layout of tensor `name`."""
        return empty_rows((self.rows, *like.shape[1:]), torch.float32, like.device, self.last[name])


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype, device=device).movedim(-1, 1)


def layout(x: Tensor, /, pairs: tuple[str, ...] = (), **tensors: Tensor | None) -> Layout:
    """Check the tensors of a call and return their layout.

    Args:
        x: `[N, …]`, the one of `tensors` that the others are compared with.
        pairs: names of tensors with 2N rows.
        tensors: by argument name, in the order of their bits in `LAST`; None for those not given.

    Raises:
        ValueError: a tensor has the wrong device, shape or dtype, or a layout that the kernels do not read.
    """
    single, device = tuple(x.shape), x.device
    rows, size = (single[0], math.prod(single[1:])) if len(single) > 1 else (0, 0)
    if not 0 < size < 2**31 - TILE:
        name = next(name for name, tensor in tensors.items() if tensor is x)
        raise ValueError(f"{name} has shape {single}: expected [N, …] with 1 to 2³¹ − {TILE + 1} elements a row")
    pair = (2 * rows, *single[1:])
    last = {}
    split = False
    for name, tensor in tensors.items():
        last[name] = tensor is not None and _is_channels_last(name, tensor, pair if name in pairs else single, device)
        split |= tensor is not None and last[name] != last[next(iter(last))]
    split &= len(single) > 2
    count = single[1] if split else 1
    block_c = 1 << (int(count) - 1).bit_length()
    block_p = max(TILE // block_c, 1)
    constants = {"C": count, "BLOCK_C": block_c, "BLOCK_P": block_p}
    constants["LAST"] = sum(flag << bit for bit, flag in enumerate(last.values())) if split else 0
    positions = size // count
    return Layout(rows, size, positions, -(-positions // block_p), constants, last)


def _is_channels_last(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> bool:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if tensor.is_contiguous():
        return False
    if len(shape) > 2 and tensor.movedim(1, -1).is_contiguous():
        return True
    raise ValueError(
        f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: expected contiguous or channels-last "
        f"(rows that are one run of memory each); pass {name}.contiguous()"
    )


def check_steps(table: Tensor, step_index: Tensor, x: Tensor) -> None:
    """Check the table and the steps of N rows. On a CPU their range is checked too. On a GPU that would wait for the device,
    so there the rows of a step that is not in the table become NaN.

    Raises:
        ValueError: wrong device, shape, dtype or step.
    """
    shape, rows, device = table.shape, x.shape[0], x.device
    if table.dtype != torch.float32 or shape[1:] != _TABLE or table.device != device or not table.is_contiguous():
        raise ValueError(
            f"table is {table.dtype} {tuple(shape)} on {table.device} with strides {table.stride()}, "
            f"expected contiguous torch.float32 (steps, {_TABLE[0]}) on {device}"
        )
    check_rows("step_index", step_index, x)
    if device.type == "cpu" and rows and not 0 <= step_index.min() <= step_index.max() < shape[0]:
        raise ValueError(f"step_index is {step_index.tolist()}, expected steps in 0..{shape[0] - 1}")


def check_rows(name: str, values: Tensor, x: Tensor) -> None:
    """Check integers by row, `[N]` int64.

    Raises:
        ValueError: wrong device, shape or dtype, or not contiguous.
    """
    if values.dtype != torch.int64 or values.shape != x.shape[:1] or values.device != x.device:
        raise ValueError(
            f"{name} is {values.dtype} {tuple(values.shape)} on {values.device}, "
            f"expected torch.int64 ({x.shape[0]},) on {x.device}"
        )
    if not values.is_contiguous():
        raise ValueError(f"{name} has strides {values.stride()}, expected contiguous; pass {name}.contiguous()")


def forbid_second_derivatives() -> None:
    """Called in a backward pass whose results come from kernels and have no graph.

    Raises:
        RuntimeError: the backward pass is to be differentiated itself.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the kernels have no second derivatives (create_graph=True): use backend='torch'")


def launch(kernel: Any, grid: tuple[int], device: torch.device, num_warps: int = NUM_WARPS, **arguments: Any) -> None:
    """Launch on `device`, which need not be the current one. An empty grid launches nothing."""
    if grid[0] == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=num_warps)
