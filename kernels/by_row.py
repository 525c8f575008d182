"""The second launch of losses by row: sums over a row's tiles, and the backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.common import read, write, write_pair
from fastnabla.kernels.launching import TILE, empty_rows, launch, layout, operation


@triton.jit
def _sum_tiles_kernel(
    partial,  # [rows, tiles, COLUMNS]
    out,  # [COLUMNS, rows]
    num_rows,
    num_tiles,
    SUMS: tl.constexpr,
    NORMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_row = tl.program_id(0)
    o_k = tl.arange(0, BLOCK_K)[None, :]
    b_sum = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    b_max = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for start in range(0, num_tiles, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)[:, None]
        mask = (o_t < num_tiles) & (o_k < COLUMNS)
        b_part = tl.load(partial + (i_row.to(tl.int64) * num_tiles + o_t) * COLUMNS + o_k, mask=mask, other=0.0)
        b_sum += b_part
        b_max = tl.maximum(b_max, b_part.to(tl.int32, bitcast=True))
    b_total = tl.sum(b_sum, 0)
    b_largest = tl.max(b_max, 0).to(tl.float32, bitcast=True)
    o_k = tl.arange(0, BLOCK_K)
    b_out = tl.where(o_k < SUMS, b_total, b_largest)
    if NORMS > 0:
        b_out = tl.where((o_k >= SUMS) & (o_k < SUMS + NORMS), tl.sqrt(b_total), b_out)
    tl.store(out + o_k * num_rows + i_row, b_out, mask=o_k < COLUMNS)


@triton.jit
def _scale_kernel(
    upstream,  # [rows]
    gradient_output,  # [rows, size], float32
    gradient_flow,  # [rows, size], float32
    out_output,  # [rows, size], or [2 rows, size] if GUIDED
    out_flow,  # [rows, size]
    upstream_stride,
    num_rows,
    size,
    num_tiles,
    w,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o = i_tile * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    o_row = i_row.to(tl.int64) * size + o
    scale = tl.load(upstream + i_row * upstream_stride).to(tl.float32)
    if out_output is not None:
        o_conditional = (i_row.to(tl.int64) + num_rows) * size + o
        b_cotangent = scale * read(gradient_output, o_row, mask)
        write_pair(out_output, o_row, o_conditional, b_cotangent, w, mask, GUIDED)
    if out_flow is not None:
        write(out_flow, o_row, scale * read(gradient_flow, o_row, mask), mask)


def sum_tiles(partial: Tensor, sums: int, norms: int = 0) -> Tensor:
    """Reduce partial results `[rows, tiles, columns]` over tiles to `[columns, rows]`.

    The first `sums` columns are added up, the next `norms` are square roots of sums, and the rest are maxima. There are no
    atomics, so results have the same bits in every run.
    """
    rows, tiles, columns = partial.shape
    out = partial.new_empty(columns, rows)
    launch(
        _sum_tiles_kernel,
        (rows,),
        partial.device,
        partial=partial,
        out=out,
        num_rows=rows,
        num_tiles=tiles,
        SUMS=sums,
        NORMS=norms,
        COLUMNS=columns,
        BLOCK_T=16,
        BLOCK_K=1 << (columns - 1).bit_length(),
        num_warps=1,
    )
    return out


def _fake_scale_gradients(upstream, gradient_output, gradient_flow, output_dtype, flow_dtype, guidance_scale):
    outs = []
    for gradient, dtype, copies in (
        (gradient_output, output_dtype, 1 if guidance_scale is None else 2),
        (gradient_flow, flow_dtype, 1),
    ):
        if gradient is None:
            outs.append(upstream.new_empty(0))
        else:
            shape = (copies * gradient.shape[0], *gradient.shape[1:])
            outs.append(empty_rows(shape, dtype, gradient.device, not gradient.is_contiguous()))
    return tuple(outs)


@operation(_fake_scale_gradients)
def scale_gradients(
    upstream: Tensor,
    gradient_output: Tensor | None,
    gradient_flow: Tensor | None,
    output_dtype: torch.dtype,
    flow_dtype: torch.dtype,
    guidance_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The backward pass of a loss by row: the stored gradients of the guided output and of the flow, times the upstream
    gradient of their row, in the inputs' dtypes. The gradient of the guided output is mapped to the pair.

    It is one launch. Per element it reads 4 bytes of each stored gradient and writes what it returns.
    """
    stored = gradient_flow if gradient_output is None else gradient_output
    made = layout(stored, stored=stored)
    out_output, out_flow = _fake_scale_gradients(
        upstream, gradient_output, gradient_flow, output_dtype, flow_dtype, guidance_scale
    )
    launch(
        _scale_kernel,
        made.grid,
        stored.device,
        upstream=upstream,
        gradient_output=gradient_output,
        gradient_flow=gradient_flow,
        out_output=None if gradient_output is None else out_output,
        out_flow=None if gradient_flow is None else out_flow,
        upstream_stride=upstream.stride(0),
        num_rows=made.rows,
        size=made.size,
        num_tiles=made.tiles,
        w=guidance_scale or 0.0,
        GUIDED=guidance_scale is not None,
        BLOCK=TILE,
    )
    return out_output, out_flow
