"""Tiles of channels-last tensors `[N, C, …]`, in memory order `[N, P, C]`, and sums over groups of adjacent channels.

A tile has 128 positions of 64 channels, or more positions of fewer channels. In bf16, a position of a tile is one line of 128
bytes, which 8 threads read by 16 bytes each. An image of 512² with 128 channels has 4096 tiles, 31 for each of an H100's
multiprocessors. A launch by tile writes two sums for each channel. A launch by group adds them up over tiles and channels in
a fixed order. So groups have any size, need not end where a tile does, and have the same bits in any batch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.common import offsets, read
from fastnabla.kernels.launching import DTYPES, launch, layout

TILE = 8192
"""Elements per tile: 32 for each thread."""
NUM_WARPS = 8
CHANNELS = 64
"""Channels per tile, at most."""
SUMS = 1024
"""Sums that the second launch reads at a time."""


@triton.jit
def channel_tile(program, positions, num_tiles, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Row, tile and channels `[1, BLOCK_C]` of a program; offsets and mask `[BLOCK_P, BLOCK_C]`."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_tile = program // BLOCKS
    i_row, i_tile = i_tile // num_tiles, i_tile % num_tiles
    o_c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    return i_row, i_tile, o_c, offsets(i_row, o_c, o_p, positions, C, 1, 0), (o_c < C) & (o_p < positions)


@triton.jit
def by_group(values, i_row, o_c, C: tl.constexpr, GROUPS: tl.constexpr):
    """Values `[rows, GROUPS]` at a row's channels."""
    return read(values, i_row * GROUPS + o_c // (C // GROUPS), o_c < C)


@triton.jit
def write_sums(sums, i_row, i_tile, num_tiles, o_c, b_first, b_second, C: tl.constexpr):
    """Write a tile's sums, `[1, BLOCK_C]` each, to `[rows, tiles, 2, C]`."""
    o = (i_row.to(tl.int64) * num_tiles + i_tile) * (2 * C) + o_c
    tl.store(sums + o, b_first, mask=o_c < C)
    tl.store(sums + o + C, b_second, mask=o_c < C)


@triton.jit
def tiles_of_group(
    start, num_tiles, C: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Tiles from `start` on `[BLOCK_T, 1]`; offsets and mask `[BLOCK_T, BLOCK_D]` of this program's group in its row's sums."""
    SIZE: tl.constexpr = C // GROUPS
    i_row, i_group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    o_t, o_d = start + tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_D)[None, :]
    o = (i_row.to(tl.int64) * num_tiles + o_t) * (2 * C) + i_group * SIZE + o_d
    return o_t, o, (o_t < num_tiles) & (o_d < SIZE)


class ChannelTiles(NamedTuple):
    """The cut of a call's tensors into tiles."""

    device: torch.device
    rows: int
    channels: int
    positions: int
    groups: int

    @property
    def block_c(self) -> int:
        return min(triton.next_power_of_2(self.channels), CHANNELS)

    @property
    def count(self) -> int:
        """Tiles per row and block of channels."""
        return triton.cdiv(self.positions, TILE // self.block_c)

    def empty_sums(self) -> Tensor:
        """Two values by row, tile and channel."""
        return torch.empty(self.rows, self.count, 2, self.channels, dtype=torch.float32, device=self.device)

    def empty_moments(self) -> tuple[Tensor, Tensor]:
        """Two values by row and group."""
        return self._empty_moment(), self._empty_moment()

    def _empty_moment(self) -> Tensor:
        return torch.empty(self.rows, self.groups, dtype=torch.float32, device=self.device)

    def launch_by_tile(self, kernel: Any, **arguments: Any) -> None:
        """One program per tile."""
        programs = self.rows * self.count * triton.cdiv(self.channels, self.block_c)
        self._launch(kernel, programs, BLOCK_C=self.block_c, num_warps=NUM_WARPS, **arguments)

    def launch_by_group(self, kernel: Any, **arguments: Any) -> None:
        """One program per row and group."""
        block_d = triton.next_power_of_2(self.channels // self.groups)
        blocks = {"BLOCK_T": max(SUMS // block_d, 1), "BLOCK_D": block_d}
        self._launch(kernel, self.rows * self.groups, **blocks, **arguments)

    def _launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        sizes = {"positions": self.positions, "num_tiles": self.count, "C": self.channels, "GROUPS": self.groups}
        launch(kernel, (programs,), self.device, **sizes, BLOCK_P=TILE // self.block_c, **arguments)


def channel_tiles(x: Tensor, weight: Tensor, bias: Tensor, groups: int, **others: Tensor | None) -> ChannelTiles:
    """Check the arguments of a call and cut its tensors into tiles.

    Args:
        x: `[N, C, …]`.
        weight, bias: `[C]`.
        groups: a divisor of C.
        others: tensors like `x`, by argument name; None for those not given.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout, or `groups` does not divide C.
    """
    size = layout(x, x=x, **others).size
    for name, tensor in {"x": x, **others}.items():
        if tensor is not None and not tensor.movedim(1, -1).is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: expected channels-last; "
                f"pass {name}.contiguous(memory_format=torch.channels_last)"
            )
    channels = x.shape[1]
    if size >= 2**31 - TILE:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected fewer than 2³¹ − {TILE} elements a row")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups = {groups}: expected a divisor of the {channels} channels")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        expected = tensor.shape == (channels,) and tensor.device == x.device and tensor.dtype in DTYPES
        if not expected or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}, "
                f"expected contiguous ({channels},) on {x.device}, of {', '.join(map(str, DTYPES))}"
            )
    return ChannelTiles(x.device, len(x), channels, size // channels, groups)
