"""The forward residual of residual ∇-DB, terminal term and trust region: losses, statistics and gradients in one pass.

Per element, with ``o = u + w (c − u)``, R = βγ'∇r(x'), and g(x') written `g` in inner and `t` in last rows:

    residual = v · ((b/σ²) (o_θ − λ o_ref) + (1 − λ)(a x − x')/σ² − g − R)          v = σ or 1
    loss     = mean residual² + mean (v t)² + κ mean (o_θ − o_old)²

The term x'/σ² that both scores share is cancelled, and the outputs are subtracted before guidance combines the halves of a
pair. The forward pass stores the gradients for o and for g in float32. The backward pass scales them by row and maps the
gradient of o to the pair.

Bytes per element of a row, with bf16 outputs and flow, float32 states and scores: reads 8 (two pairs) + 8 (x, x') + 4 (∇r)
+ 4 (o_old) + 2 (g), writes 8; 34 in all. Backward: reads 8, writes 6. Each is one pass, plus a reduction of 36 bytes per tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.by_row import scale_gradients, sum_tiles
from fastnabla.kernels.common import (
    ALPHA_BAR_NEXT,
    GAMMAS,
    PRECISION,
    SIGMA,
    A,
    B,
    coefficient,
    guide,
    largest,
    offsets,
    pair_offsets,
    read,
    read_pair,
    reward_weight,
    tile,
    total,
    write,
)
from fastnabla.kernels.launching import check_steps, forbid_second_derivatives, launch, layout, operation

COLUMNS = (
    *("loss", "forward", "terminal", "trust"),  # means of squares
    *("norm_ref", "norm_residual", "norm_reward", "norm_target"),  # square roots of sums of squares
    "max_residual",
)
_NUM_COLUMNS = tl.constexpr(len(COLUMNS))


@triton.jit
def _forward_balance_kernel(
    # read; bits of LAST in this order
    output,
    output_ref,
    x,
    x_next,
    reward_score_next,
    flow_next,
    output_old,
    table,
    step_index,
    # written
    gradient_output,
    gradient_flow,
    partial,
    # sizes
    num_rows,
    num_steps,
    positions,
    num_tiles,
    inverse_size,
    # weights
    w,
    beta,
    prior_weight,
    trust_region_weight,
    GUIDED: tl.constexpr,
    GAMMA: tl.constexpr,
    BY_SIGMA: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_c, o_p, mask = tile(i_tile, positions, C, BLOCK_C, BLOCK_P)
    o_output, o_output_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 0)
    o_ref, o_ref_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 1)

    i_step = tl.load(step_index + i_row)
    a, b = coefficient(table, i_step, num_steps, A), coefficient(table, i_step, num_steps, B)
    precision = coefficient(table, i_step, num_steps, PRECISION)
    reward_scale = beta * reward_weight(coefficient(table, i_step, num_steps, ALPHA_BAR_NEXT), GAMMA)
    unit = 1.0
    if BY_SIGMA:
        unit = coefficient(table, i_step, num_steps, SIGMA)

    b_u, b_c = read_pair(output, o_output, o_output_c, mask, GUIDED)
    b_u_ref, b_c_ref = read_pair(output_ref, o_ref, o_ref_c, mask, GUIDED)
    b_x = read(x, offsets(i_row, o_c, o_p, positions, C, LAST, 2), mask)
    b_x_next = read(x_next, offsets(i_row, o_c, o_p, positions, C, LAST, 3), mask)
    b_target = reward_scale * read(reward_score_next, offsets(i_row, o_c, o_p, positions, C, LAST, 4), mask)

    b_change = guide(b_u - prior_weight * b_u_ref, b_c - prior_weight * b_c_ref, w, GUIDED)
    b_difference = precision * (b * b_change + (1 - prior_weight) * (a * b_x - b_x_next))
    b_score_ref = -prior_weight * precision * (b_x_next - a * b_x - b * guide(b_u_ref, b_c_ref, w, GUIDED))
    reward2 = total(b_target * b_target)
    terminal2 = 0.0
    if flow_next is not None:
        o_flow = offsets(i_row, o_c, o_p, positions, C, LAST, 5)
        b_flow = read(flow_next, o_flow, mask)
        is_last = i_step == num_steps - 1
        b_target += tl.where(is_last, 0.0, b_flow)
        b_terminal = tl.where(is_last, unit * b_flow, 0.0)
        terminal2 = total(b_terminal * b_terminal)
    # Outside the row every tensor reads 0, so all of these are 0 there.
    b_residual = unit * (b_difference - b_target)

    b_gradient = 2 * inverse_size * unit * b * precision * b_residual
    trust2 = 0.0
    if output_old is not None:
        b_old = read(output_old, offsets(i_row, o_c, o_p, positions, C, LAST, 6), mask)
        b_moved = guide(b_u, b_c, w, GUIDED) - b_old
        trust2 = total(b_moved * b_moved)
        b_gradient += 2 * inverse_size * trust_region_weight * b_moved
    if gradient_output is not None:
        write(gradient_output, o_output, b_gradient, mask)
    if gradient_flow is not None:
        write(gradient_flow, o_flow, 2 * inverse_size * unit * tl.where(is_last, b_terminal, -b_residual), mask)

    forward2 = total(b_residual * b_residual)
    to_part = partial + tl.program_id(0).to(tl.int64) * _NUM_COLUMNS
    tl.store(to_part + 0, (forward2 + terminal2 + trust_region_weight * trust2) * inverse_size)
    tl.store(to_part + 1, forward2 * inverse_size)
    tl.store(to_part + 2, terminal2 * inverse_size)
    tl.store(to_part + 3, trust2 * inverse_size)
    tl.store(to_part + 4, total(b_score_ref * b_score_ref))
    tl.store(to_part + 5, total(b_difference * b_difference))
    tl.store(to_part + 6, reward2)
    tl.store(to_part + 7, total((b_score_ref + b_target) * (b_score_ref + b_target)))
    tl.store(to_part + 8, largest(b_residual))


def _layout(output, output_ref, x, x_next, reward_score_next, flow_next, output_old, guidance_scale):
    return layout(
        x,
        pairs=() if guidance_scale is None else ("output", "output_ref"),
        output=output,
        output_ref=output_ref,
        x=x,
        x_next=x_next,
        reward_score_next=reward_score_next,
        flow_next=flow_next,
        output_old=output_old,
    )


def _results(made, output, flow_next, with_gradients):
    """Uninitialised gradients of the guided output and of the flow; empty unless `with_gradients`."""
    nothing = output.new_empty(0, dtype=torch.float32)
    if not with_gradients:
        return nothing, nothing.clone()
    return made.empty("output", output), nothing if flow_next is None else made.empty("flow_next", flow_next)


def _fake(
    output,
    output_ref,
    x,
    x_next,
    table,
    step_index,
    reward_score_next,
    flow_next,
    output_old,
    guidance_scale,
    *settings,
):
    made = _layout(output, output_ref, x, x_next, reward_score_next, flow_next, output_old, guidance_scale)
    parts = x.new_empty(len(COLUMNS), len(x), dtype=torch.float32)
    return parts, *_results(made, output, flow_next, settings[-1])


@operation(_fake)
def forward_balance_op(
    output: Tensor,
    output_ref: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None,
    output_old: Tensor | None,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    prior_weight: float,
    by_sigma: bool,
    trust_region_weight: float,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    made = _layout(output, output_ref, x, x_next, reward_score_next, flow_next, output_old, guidance_scale)
    check_steps(table, step_index, x)
    gradient_output, gradient_flow = _results(made, output, flow_next, with_gradients)
    partial = x.new_empty(made.rows, made.tiles, len(COLUMNS), dtype=torch.float32)
    launch(
        _forward_balance_kernel,
        made.grid,
        x.device,
        **made.arguments(table, step_index, guidance_scale),
        output=output,
        output_ref=output_ref,
        x=x,
        x_next=x_next,
        reward_score_next=reward_score_next,
        flow_next=flow_next,
        output_old=output_old,
        gradient_output=gradient_output if with_gradients else None,
        gradient_flow=gradient_flow if with_gradients and flow_next is not None else None,
        partial=partial,
        inverse_size=1 / made.size,
        beta=beta,
        prior_weight=prior_weight,
        trust_region_weight=trust_region_weight,
        GAMMA=GAMMAS.index(gamma),
        BY_SIGMA=by_sigma,
    )
    return sum_tiles(partial, sums=4, norms=4), gradient_output, gradient_flow


class _ForwardBalance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, output, flow_next, output_ref, x, x_next, table, step_index, reward_score_next, output_old, *settings
    ):
        parts, gradient_output, gradient_flow = forward_balance_op(
            output, output_ref, x, x_next, table, step_index, reward_score_next, flow_next, output_old, *settings
        )
        ctx.save_for_backward(gradient_output, gradient_flow)
        ctx.guidance_scale, ctx.has_flow = settings[0], flow_next is not None
        ctx.dtypes = output.dtype, output.dtype if flow_next is None else flow_next.dtype
        statistics = parts[1:]
        ctx.mark_non_differentiable(statistics)
        return parts[0], statistics

    @staticmethod
    def backward(ctx, upstream, _):
        forbid_second_derivatives()
        gradient_output, gradient_flow = ctx.saved_tensors
        output, flow_next = scale_gradients(
            upstream, gradient_output, gradient_flow if ctx.has_flow else None, *ctx.dtypes, ctx.guidance_scale
        )
        return output, flow_next if ctx.has_flow else None, *(None,) * 14


def forward_balance(
    output: Tensor,
    output_ref: Tensor,
    x: Tensor,
    x_next: Tensor,
    table: Tensor,
    step_index: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    output_old: Tensor | None = None,
    *,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    prior_weight: float,
    by_sigma: bool,
    trust_region_weight: float,
) -> tuple[Tensor, Tensor]:
    """The loss by row `[N]`, with gradients to `output` and `flow_next`, and its `COLUMNS[1:]`, `[8, N]` float32.

    Args:
        output, output_ref: pairs `[2N, …]`, or `[N, …]` without guidance.
        x, x_next, reward_score_next, flow_next, output_old: `[N, …]`.
        table: coefficients `[T, 8]` float32, as `fastnabla.transition.TransitionTable.packed`.
        step_index: rows of the table, `[N]` int64.
        guidance_scale, beta, gamma, prior_weight, by_sigma, trust_region_weight: w, β, γ, λ, weighting by σ and κ.

    Tensors are bfloat16, float16 or float32 in any mixture, contiguous or channels-last, on one device.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout.

    Equivalent: `fastnabla.objective.balance.forward_balance`.
    """
    with_gradients = torch.is_grad_enabled() and (
        output.requires_grad or (flow_next is not None and flow_next.requires_grad)
    )
    return _ForwardBalance.apply(
        output,
        flow_next,
        output_ref.detach(),
        x.detach(),
        x_next.detach(),
        table,
        step_index,
        reward_score_next.detach(),
        None if output_old is None else output_old.detach(),
        guidance_scale,
        beta,
        gamma,
        prior_weight,
        by_sigma,
        trust_region_weight,
        with_gradients,
    )
