"""The reverse residual of residual ∇-DB: its loss by row, and the gradient of the flow score.

Per element, with R = βγ∇r(x), or βγ c ∂r/∂x̂0 if the rest of ∇r is in the products:

    residual = v · (λ (s̄_θ − s̄_ref) + R + g)          v = σ or 1; 0 in last rows
    loss     = mean residual²

``λ (s̄_θ − s̄_ref)`` is computed from two whole scores, or, if output pairs are given, from two vector-Jacobian products plus
the direct part ``−λ (a b/σ²)(o_θ − o_ref)``. The forward pass stores the gradient of g in float32.

Bytes per element of a row, with bf16 outputs and flow, float32 scores: reads 8 (two pairs) + 8 (products) + 4 (reward) + 2 (g),
writes 4; 26 in all. Backward: reads 4, writes 2. Each is one pass, plus a reduction of 4 bytes per tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnabla.kernels.by_row import scale_gradients, sum_tiles
from fastnabla.kernels.common import (
    ALPHA_BAR,
    C_CLEAN,
    GAMMAS,
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
    reward_weight,
    tile,
    total,
    write,
)
from fastnabla.kernels.launching import check_steps, forbid_second_derivatives, launch, layout, operation


@triton.jit
def _reverse_balance_kernel(
    # read; bits of LAST in this order
    score,
    score_ref,
    flow,
    reward_score,
    output,
    output_ref,
    table,
    step_index,
    # written
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
    GUIDED: tl.constexpr,
    GAMMA: tl.constexpr,
    BY_SIGMA: tl.constexpr,
    AT_PREDICTION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    i_row, i_tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_c, o_p, mask = tile(i_tile, positions, C, BLOCK_C, BLOCK_P)
    o_flow = offsets(i_row, o_c, o_p, positions, C, LAST, 2)

    i_step = tl.load(step_index + i_row)
    reward_scale = beta * reward_weight(coefficient(table, i_step, num_steps, ALPHA_BAR), GAMMA)
    if AT_PREDICTION:
        reward_scale *= coefficient(table, i_step, num_steps, C_CLEAN)
    unit = 1.0
    if BY_SIGMA:
        unit = coefficient(table, i_step, num_steps, SIGMA)

    b_difference = read(score, offsets(i_row, o_c, o_p, positions, C, LAST, 0), mask)
    b_difference -= read(score_ref, offsets(i_row, o_c, o_p, positions, C, LAST, 1), mask)
    if output is None:
        b_difference *= prior_weight
    else:
        o_output, o_output_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 4)
        o_ref, o_ref_c = pair_offsets(i_row, num_rows, o_c, o_p, positions, C, LAST, 5)
        b_u, b_c = read_pair(output, o_output, o_output_c, mask, GUIDED)
        b_u_ref, b_c_ref = read_pair(output_ref, o_ref, o_ref_c, mask, GUIDED)
        a, b = coefficient(table, i_step, num_steps, A), coefficient(table, i_step, num_steps, B)
        direct = prior_weight * a * b * coefficient(table, i_step, num_steps, PRECISION)
        b_difference -= direct * guide(b_u - b_u_ref, b_c - b_c_ref, w, GUIDED)
    b_reward = reward_scale * read(reward_score, offsets(i_row, o_c, o_p, positions, C, LAST, 3), mask)
    b_residual = unit * (b_difference + b_reward + read(flow, o_flow, mask))
    b_residual = tl.where(i_step == num_steps - 1, 0.0, b_residual)

    if gradient_flow is not None:
        write(gradient_flow, o_flow, 2 * inverse_size * unit * b_residual, mask)
    tl.store(partial + tl.program_id(0), total(b_residual * b_residual) * inverse_size)


def _layout(score, score_ref, flow, reward_score, output, output_ref, guidance_scale, at_prediction):
    return layout(
        score,
        pairs=() if guidance_scale is None else ("output", "output_ref"),
        score=score,
        score_ref=score_ref,
        flow=flow,
        **{"pixel_score" if at_prediction else "reward_score": reward_score},
        output=output,
        output_ref=output_ref,
    )


def _results(made, flow, with_gradient):
    """The uninitialised gradient of the flow; empty unless `with_gradient`."""
    return made.empty("flow", flow) if with_gradient else flow.new_empty(0, dtype=torch.float32)


def _fake(score, score_ref, table, step_index, flow, reward_score, output, output_ref, guidance_scale, *settings):
    made = _layout(score, score_ref, flow, reward_score, output, output_ref, guidance_scale, settings[-2])
    return score.new_empty(len(score), dtype=torch.float32), _results(made, flow, settings[-1])


@operation(_fake)
def reverse_balance_op(
    score: Tensor,
    score_ref: Tensor,
    table: Tensor,
    step_index: Tensor,
    flow: Tensor,
    reward_score: Tensor,
    output: Tensor | None,
    output_ref: Tensor | None,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    prior_weight: float,
    by_sigma: bool,
    at_prediction: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    made = _layout(score, score_ref, flow, reward_score, output, output_ref, guidance_scale, at_prediction)
    check_steps(table, step_index, score)
    gradient_flow = _results(made, flow, with_gradient)
    partial = score.new_empty(made.rows, made.tiles, 1, dtype=torch.float32)
    launch(
        _reverse_balance_kernel,
        made.grid,
        score.device,
        **made.arguments(table, step_index, guidance_scale),
        score=score,
        score_ref=score_ref,
        flow=flow,
        reward_score=reward_score,
        output=output,
        output_ref=output_ref,
        gradient_flow=gradient_flow if with_gradient else None,
        partial=partial,
        inverse_size=1 / made.size,
        beta=beta,
        prior_weight=prior_weight,
        GAMMA=GAMMAS.index(gamma),
        BY_SIGMA=by_sigma,
        AT_PREDICTION=at_prediction,
    )
    return sum_tiles(partial, sums=1).view(made.rows), gradient_flow


class _ReverseBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flow, score, score_ref, table, step_index, *others):
        loss, gradient_flow = reverse_balance_op(score, score_ref, table, step_index, flow, *others)
        ctx.save_for_backward(gradient_flow)
        ctx.dtype = flow.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        forbid_second_derivatives()
        (gradient_flow,) = ctx.saved_tensors
        _, flow = scale_gradients(upstream, None, gradient_flow, ctx.dtype, ctx.dtype, None)
        return flow, *(None,) * 14


def reverse_balance(
    score: Tensor,
    score_ref: Tensor,
    table: Tensor,
    step_index: Tensor,
    flow: Tensor,
    reward_score: Tensor,
    outputs: tuple[Tensor, Tensor] | None = None,
    *,
    guidance_scale: float | None,
    beta: float,
    gamma: str,
    prior_weight: float,
    by_sigma: bool,
    at_prediction: bool,
) -> Tensor:
    """The loss by row, `[N]` float32, with gradients to `flow`.

    Args:
        score, score_ref: `[N, …]`, s̄_θ and s̄_ref; with `outputs` the vector-Jacobian products, which include λ.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        flow: g(x), `[N, …]`.
        reward_score: `[N, …]`, ∇r(x), or ∂r/∂x̂0 if `at_prediction`.
        outputs: pairs of policy and reference, `[2N, …]`, or `[N, …]` without guidance.
        guidance_scale, beta, gamma, prior_weight, by_sigma: w, β, γ, λ and weighting by σ.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout.

    Equivalent: `fastnabla.objective.balance.reverse_balance`.
    """
    output, output_ref = (None, None) if outputs is None else (tensor.detach() for tensor in outputs)
    return _ReverseBalance.apply(
        flow,
        score.detach(),
        score_ref.detach(),
        table,
        step_index,
        reward_score.detach(),
        output,
        output_ref,
        guidance_scale,
        beta,
        gamma,
        prior_weight,
        by_sigma,
        at_prediction,
        torch.is_grad_enabled() and flow.requires_grad,
    )
