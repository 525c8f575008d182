"""The log-density of a step, ``log N(x'; a x + b o, σ² I)``, by row, for policy gradients and scores.

Per element, with ``o = u + w (c − u)`` and ``e = (x' − a x − b o)/σ²``; summed over the row:

    log_prob = −½ σ² e² − log σ − ½ log 2π

The forward pass stores e in float32. The gradients are ``b e`` (mapped to the pair), ``a e`` and ``−e``.

Bytes per element of a row, with bf16 outputs and float32 states: reads 4 (pair) + 8 (x, x'), writes 4. Backward: reads 4,
writes 4 (pair) and 4 for each state that needs a gradient. Each is one pass, plus a reduction of 4 bytes per tile.
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
    tile,
    total,
    write,
    write_pair,
)
from fastnabla.kernels.launching import check_steps, forbid_second_derivatives, launch, layout, operation

_HALF_LOG_2_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _gaussian_log_prob_kernel(
    # read; bits of LAST in this order
    output,
    x,
    x_next,
    table,
    step_index,
    # written
    scaled_noise,  # e, laid out as x
    partial,
    # sizes
    num_rows,
    num_steps,
    positions,
    num_tiles,
    w,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_c, o_p, mask = tile(i_tile, positions, C, BLOCK_C, BLOCK_P)
    o_output, o_output_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 0)
    o_x = offsets(i_row, o_c, o_p, positions, C, LAST, 1)

    i_step = tl.load(step_index + i_row)
    a, b = coefficient(table, i_step, num_steps, A), coefficient(table, i_step, num_steps, B)
    sigma = coefficient(table, i_step, num_steps, SIGMA)

    b_u, b_c = read_pair(output, o_output, o_output_c, mask, GUIDED)
    b_x_next = read(x_next, offsets(i_row, o_c, o_p, positions, C, LAST, 2), mask)
    b_e = (b_x_next - a * read(x, o_x, mask) - b * guide(b_u, b_c, w, GUIDED)) * coefficient(
        table, i_step, num_steps, PRECISION
    )
    if scaled_noise is not None:
        write(scaled_noise, o_x, b_e, mask)
    b_noise = sigma * b_e
    b_log = -0.5 * b_noise * b_noise - (tl.log(sigma) + _HALF_LOG_2_PI)
    tl.store(partial + tl.program_id(0), total(tl.where(mask, b_log, 0.0)))


@triton.jit
def _gaussian_log_prob_backward_kernel(
    # laid out as bits 0, 1, 2 of LAST say: the output, x and scaled_noise, x_next
    upstream,
    scaled_noise,
    table,
    step_index,
    # written
    gradient_output,
    gradient_x,
    gradient_x_next,
    # sizes
    upstream_stride,
    num_rows,
    num_steps,
    positions,
    num_tiles,
    w,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_c, o_p, mask = tile(i_tile, positions, C, BLOCK_C, BLOCK_P)
    o_x = offsets(i_row, o_c, o_p, positions, C, LAST, 1)
    i_step = tl.load(step_index + i_row)
    b_e = tl.load(upstream + i_row * upstream_stride) * read(scaled_noise, o_x, mask)
    if gradient_x is not None:
        write(gradient_x, o_x, coefficient(table, i_step, num_steps, A) * b_e, mask)
    if gradient_x_next is not None:
        write(gradient_x_next, offsets(i_row, o_c, o_p, positions, C, LAST, 2), -b_e, mask)
    if gradient_output is not None:
        o_output, o_output_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 0)
        b_cotangent = coefficient(table, i_step, num_steps, B) * b_e
        write_pair(gradient_output, o_output, o_output_c, b_cotangent, w, mask, GUIDED)


def _layout(output, x, x_next, guidance_scale):
    return layout(x, pairs=() if guidance_scale is None else ("output",), output=output, x=x, x_next=x_next)


def _fake(output, x, x_next, table, step_index, guidance_scale, with_gradients):
    made = _layout(output, x, x_next, guidance_scale)
    stored = made.empty("x", x) if with_gradients else x.new_empty(0, dtype=torch.float32)
    return x.new_empty(len(x), dtype=torch.float32), stored


@operation(_fake)
def gaussian_log_prob_op(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    guidance_scale: float | None,
    with_gradients: bool,
) -> tuple[Tensor, Tensor]:
    made = _layout(output, x, x_next, guidance_scale)
    check_steps(table, step_index, x)
    scaled_noise = made.empty("x", x) if with_gradients else x.new_empty(0, dtype=torch.float32)
    partial = x.new_empty(made.rows, made.tiles, 1, dtype=torch.float32)
    launch(
        _gaussian_log_prob_kernel,
        made.grid,
        x.device,
        **made.arguments(table, step_index, guidance_scale),
        output=output,
        x=x,
        x_next=x_next,
        scaled_noise=scaled_noise if with_gradients else None,
        partial=partial,
    )
    return sum_tiles(partial, sums=1).view(made.rows), scaled_noise


def _fake_backward(upstream, scaled_noise, output, x, x_next, table, step_index, guidance_scale, needs):
    tensors = (output, x, x_next)
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True))


@operation(_fake_backward)
def gaussian_log_prob_backward_op(
    upstream: Tensor,
    scaled_noise: Tensor,
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    guidance_scale: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    made = _layout(output, x, x_next, guidance_scale)
    gradients = _fake_backward(upstream, scaled_noise, output, x, x_next, table, step_index, guidance_scale, needs)
    gradient_output, gradient_x, gradient_x_next = (
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    )
    launch(
        _gaussian_log_prob_backward_kernel,
        made.grid,
        x.device,
        **made.arguments(table, step_index, guidance_scale),
        upstream=upstream,
        scaled_noise=scaled_noise,
        gradient_output=gradient_output,
        gradient_x=gradient_x,
        gradient_x_next=gradient_x_next,
        upstream_stride=upstream.stride(0),
    )
    return gradients


class _GaussianLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, x, x_next, table, step_index, guidance_scale, with_gradients):
        log_prob, scaled_noise = gaussian_log_prob_op(
            output, x, x_next, table, step_index, guidance_scale, with_gradients
        )
        ctx.save_for_backward(scaled_noise, output, x, x_next, table, step_index)
        ctx.guidance_scale = guidance_scale
        return log_prob

    @staticmethod
    def backward(ctx, upstream):
        forbid_second_derivatives()
        needs = list(ctx.needs_input_grad[:3])
        gradients = gaussian_log_prob_backward_op(upstream, *ctx.saved_tensors, ctx.guidance_scale, needs)
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *(None,) * 4


def gaussian_log_prob(
    output: Tensor, x: Tensor, x_next: Tensor, table: Tensor, step_index: Tensor, *, guidance_scale: float | None
) -> Tensor:
    """The log-density of each step, `[N]` float32, with gradients to `output`, `x` and `x_next`.

    Args:
        output: pair `[2N, …]`, or `[N, …]` without guidance.
        x, x_next: `[N, …]`.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        guidance_scale: w.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout.

    Equivalent: `fastnabla.objective.gaussian.gaussian_log_prob`.
    """
    with_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (output, x, x_next))
    return _GaussianLogProb.apply(output, x, x_next, table, step_index, guidance_scale, with_gradients)
