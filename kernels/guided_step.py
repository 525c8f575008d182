"""One step of the sampler, ``x' = a x + b o + σ ε``, stored where it is wanted.

By element, with ``o = u + w (c − u)``. The noise ε is given, or drawn here: channels 4q … 4q + 3 at position p of a row
get the four normals (Box–Muller) of the Philox4x32-10 block with the row's seed as key and (p, q, step, 0) as counter. So
it depends on seed and step alone, not on the batch. x' and o can also be written to rows of slabs, such as a
trajectory buffer's. The log-density is that of x' as it was rounded to its dtype.

Bytes by element of a row, with a bf16 output and float32 states: reads 4 (pair) + 4 (x), and 4 of noise if given; writes 4
(x'), 4 (o), and what is stored in slabs. One launch, and one for the log-density.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.by_row import sum_tiles
from fastnabla.kernels.common import (
    PRECISION,
    SIGMA,
    A,
    B,
    coefficient,
    guide,
    offsets,
    pair_offsets,
    read,
    read_pair,
    total,
    write,
)
from fastnabla.kernels.launching import DTYPES, Layout, check_rows, check_steps, launch, layout, operation

_ELEMENTS = 2048
"""Of a program: 512 positions of four channels that share Philox blocks; 16 bytes of bf16 a thread of two warps."""
_HALF_LOG_2_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def normals(seed, o_p, i_quad, i_step):
    """Four blocks of standard normals from one Philox block."""
    zero = o_p * 0
    bits = tl.philox(seed, o_p, zero + i_quad, zero + i_step, zero)
    uniform0, uniform1 = tl.uint_to_uniform_float(bits[0]), tl.uint_to_uniform_float(bits[1])
    uniform2, uniform3 = tl.uint_to_uniform_float(bits[2]), tl.uint_to_uniform_float(bits[3])
    n0, n1 = tl.pair_uniform_to_normal(uniform0, uniform1)
    n2, n3 = tl.pair_uniform_to_normal(uniform2, uniform3)
    return n0, n1, n2, n3


@triton.jit
def slab_row(rows, i_row, num_slab_rows, size):
    """Where row `rows[i_row]` of a slab starts, and whether the slab has it."""
    i_slab = tl.load(rows + i_row)
    return i_slab * size, (i_slab >= 0) & (i_slab < num_slab_rows)


@triton.jit
def _guided_step_kernel(
    # read; bits of LAST in this order
    output,
    x,
    noise,
    seeds,
    table,
    step_index,
    # written
    x_next,  # laid out as x
    guided,  # laid out as x
    partial,
    state_slab,  # contiguous
    state_rows,
    output_slab,  # contiguous
    output_rows,
    # sizes
    num_rows,
    num_steps,
    positions,
    num_tiles,
    num_state_rows,
    num_output_rows,
    w,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_quad = tl.arange(0, (BLOCK_C + 3) // 4)[:, None]
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    i_step = tl.load(step_index + i_row)
    a, b = coefficient(table, i_step, num_steps, A), coefficient(table, i_step, num_steps, B)
    sigma = coefficient(table, i_step, num_steps, SIGMA)
    precision = coefficient(table, i_step, num_steps, PRECISION)
    if noise is None:
        b_normals = normals(tl.load(seeds + i_row), o_p + o_quad * 0, o_quad, i_step.to(tl.int32))
    if state_slab is not None:
        state_start, keeps_state = slab_row(state_rows, i_row, num_state_rows, C * positions)
    if output_slab is not None:
        output_start, keeps_output = slab_row(output_rows, i_row, num_output_rows, C * positions)
    log_prob = 0.0

    for lane in tl.static_range(4 if C > 4 else C):
        o_c = 4 * o_quad + lane
        mask = (o_c < C) & (o_p < positions)
        o_output, o_output_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 0)
        o_x = offsets(i_row, o_c, o_p, positions, C, LAST, 1)

        b_u, b_c = read_pair(output, o_output, o_output_c, mask, GUIDED)
        b_o = guide(b_u, b_c, w, GUIDED)
        b_mean = a * read(x, o_x, mask) + b * b_o
        if noise is None:
            b_noise = b_normals[lane]
        else:
            b_noise = read(noise, offsets(i_row, o_c, o_p, positions, C, LAST, 2), mask)
        b_x_next = (b_mean + sigma * b_noise).to(x_next.dtype.element_ty)
        tl.store(x_next + o_x, b_x_next, mask=mask)
        write(guided, o_x, b_o, mask)
        if state_slab is not None:
            write(state_slab, state_start + o_c * positions + o_p, b_x_next, mask & keeps_state)
        if output_slab is not None:
            write(output_slab, output_start + o_c * positions + o_p, b_o, mask & keeps_output)
        if partial is not None:
            b_drawn = b_x_next.to(tl.float32) - b_mean
            b_log = -0.5 * precision * b_drawn * b_drawn - (tl.log(sigma) + _HALF_LOG_2_PI)
            log_prob += total(tl.where(mask, b_log, 0.0))
    if partial is not None:
        tl.store(partial + tl.program_id(0), log_prob)


def _layout(output: Tensor, x: Tensor, noise: Tensor | None, guidance_scale: float | None) -> Layout:
    pairs = () if guidance_scale is None else ("output",)
    return layout(x, pairs, channels=True, elements=_ELEMENTS, output=output, x=x, noise=noise)


def _check_slab(name: str, slab: Tensor | None, rows: Tensor | None, x: Tensor) -> None:
    if (slab is None) != (rows is None):
        raise ValueError(f"{name}_slab and {name}_rows: expected both or neither")
    if slab is None:
        return
    if slab.shape[1:] != x.shape[1:] or slab.device != x.device or not slab.is_contiguous():
        raise ValueError(
            f"{name}_slab is {tuple(slab.shape)} on {slab.device} with strides {slab.stride()}, "
            f"expected contiguous [rows, *{tuple(x.shape[1:])}] on {x.device}"
        )
    if slab.dtype not in DTYPES:
        raise ValueError(f"{name}_slab has dtype {slab.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    check_rows(f"{name}_rows", rows, x)


def _fake(output, x, noise, seeds, table, step_index, guidance_scale, with_log_prob, *slabs):
    made = _layout(output, x, noise, guidance_scale)
    log_prob = x.new_empty(len(x) if with_log_prob else 0, dtype=torch.float32)
    return torch.empty_like(x), made.empty("x", x), log_prob


@operation(_fake, mutates=("state_slab", "output_slab"))
def guided_step_op(
    output: Tensor,
    x: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    guidance_scale: float | None,
    with_log_prob: bool,
    state_slab: Tensor | None,
    state_rows: Tensor | None,
    output_slab: Tensor | None,
    output_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    made = _layout(output, x, noise, guidance_scale)
    check_steps(table, step_index, x)
    if (noise is None) == (seeds is None):
        raise ValueError("noise and seeds: expected one of them")
    if seeds is not None:
        check_rows("seeds", seeds, x)
    _check_slab("state", state_slab, state_rows, x)
    _check_slab("output", output_slab, output_rows, x)
    x_next, guided = torch.empty_like(x), made.empty("x", x)
    partial = x.new_empty(made.rows, made.tiles, 1, dtype=torch.float32) if with_log_prob else None
    launch(
        _guided_step_kernel,
        made.grid,
        x.device,
        **made.arguments(table, step_index, guidance_scale),
        output=output,
        x=x,
        noise=noise,
        seeds=seeds,
        x_next=x_next,
        guided=guided,
        partial=partial,
        state_slab=state_slab,
        state_rows=state_rows,
        output_slab=output_slab,
        output_rows=output_rows,
        num_state_rows=0 if state_slab is None else len(state_slab),
        num_output_rows=0 if output_slab is None else len(output_slab),
        num_warps=2,
    )
    log_prob = sum_tiles(partial, sums=1).view(made.rows) if with_log_prob else x.new_empty(0, dtype=torch.float32)
    return x_next, guided, log_prob


def guided_step(
    output: Tensor,
    x: Tensor,
    table: Tensor,
    step_index: Tensor,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    *,
    guidance_scale: float | None,
    with_log_prob: bool = False,
    state_slab: Tensor | None = None,
    state_rows: Tensor | None = None,
    output_slab: Tensor | None = None,
    output_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x' `[N, …]` in dtype and layout of `x`; o `[N, …]`, float32; and, if asked for, the log-density of x', `[N]`.

    Nothing carries a gradient.

    Args:
        output: pair `[2N, …]`, or `[N, …]` without guidance.
        x: `[N, …]`.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        noise: ε `[N, …]`; or instead
        seeds: `[N]` int64, one a row, to draw it from.
        guidance_scale: w.
        with_log_prob: whether to compute the log-density.
        state_slab, state_rows: `[rows, …]` contiguous and `[N]` int64: where x' is written to; a row that the slab
            does not have, such as -1, is not stored.
        output_slab, output_rows: likewise for o.

    Raises:
        ValueError: a tensor has a device, shape, dtype or layout that it should not; or not one of noise and seeds.

    Equivalent with given noise: `fastnabla.objective.gaussian.guided_step`.
    """
    x_next, guided, log_prob = guided_step_op(
        output.detach(),
        x.detach(),
        noise,
        seeds,
        table,
        step_index,
        guidance_scale,
        with_log_prob,
        state_slab,
        state_rows,
        output_slab,
        output_rows,
    )
    return x_next, guided, log_prob if with_log_prob else None
