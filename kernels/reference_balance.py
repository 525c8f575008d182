"""The reverse residual whose target follows the reference policy: its loss by row, and the gradient of the flow score.

Per element, with ``h(x') = βγ'∇r(x') + g(x')``, without g in last rows, and R = βγ∇r(x), or βγ c ∂r/∂x̂0 if the rest of ∇r is
in the product or is left out:

    residual = v · (g + R − a h(x') + vjp)          v = σ or 1
    loss     = mean residual²

``vjp`` is the vector-Jacobian product of `reference_cotangent`. The forward pass stores the gradient of g in float32.

Bytes per element of a row, with bf16 flow, float32 scores: reads 4 (product) + 2 (g) + 4 (∇r(x')) + 2 (g(x')) + 4 (reward),
writes 4; 20 in all. Backward: reads 4, writes 2. Each is one pass, plus a reduction of 4 bytes per tile.
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
    SIGMA,
    A,
    coefficient,
    next_flow_score,
    offsets,
    read,
    reward_weight,
    tile,
    total,
    write,
)
from fastnabla.kernels.launching import check_steps, forbid_second_derivatives, launch, layout, operation


@triton.jit
def _reference_balance_kernel(
    # read; bits of LAST in this order
    vjp,
    flow,
    reward_score_next,
    flow_next,
    reward_score,
    table,
    step_index,
    # written
    gradient_flow,
    partial,
    # sizes
    num_steps,
    positions,
    num_tiles,
    inverse_size,
    # weights
    beta,
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
    o_flow = offsets(i_row, o_c, o_p, positions, C, LAST, 1)
    o_reward, o_next = offsets(i_row, o_c, o_p, positions, C, LAST, 2), offsets(i_row, o_c, o_p, positions, C, LAST, 3)

    i_step = tl.load(step_index + i_row)
    reward_scale = beta * reward_weight(coefficient(table, i_step, num_steps, ALPHA_BAR), GAMMA)
    if AT_PREDICTION:
        reward_scale *= coefficient(table, i_step, num_steps, C_CLEAN)
    unit = 1.0
    if BY_SIGMA:
        unit = coefficient(table, i_step, num_steps, SIGMA)

    b_next = next_flow_score(
        reward_score_next, flow_next, o_reward, o_next, mask, table, i_step, num_steps, beta, GAMMA
    )
    b_constant = read(vjp, offsets(i_row, o_c, o_p, positions, C, LAST, 0), mask)
    b_constant -= coefficient(table, i_step, num_steps, A) * b_next
    b_constant += reward_scale * read(reward_score, offsets(i_row, o_c, o_p, positions, C, LAST, 4), mask)
    b_residual = unit * (read(flow, o_flow, mask) + b_constant)

    if gradient_flow is not None:
        write(gradient_flow, o_flow, 2 * inverse_size * unit * b_residual, mask)
    tl.store(partial + tl.program_id(0), total(b_residual * b_residual) * inverse_size)


def _layout(vjp, flow, reward_score_next, flow_next, reward_score, at_prediction):
    return layout(
        vjp,
        vjp=vjp,
        flow=flow,
        reward_score_next=reward_score_next,
        flow_next=flow_next,
        **{"pixel_score" if at_prediction else "reward_score": reward_score},
    )


def _results(made, flow, with_gradient):
    """The uninitialised gradient of the flow; empty unless `with_gradient`."""
    return made.empty("flow", flow) if with_gradient else flow.new_empty(0, dtype=torch.float32)


def _fake(vjp, table, step_index, flow, reward_score_next, flow_next, reward_score, *settings):
    made = _layout(vjp, flow, reward_score_next, flow_next, reward_score, settings[-2])
    return vjp.new_empty(len(vjp), dtype=torch.float32), _results(made, flow, settings[-1])


@operation(_fake)
def reference_balance_op(
    vjp: Tensor,
    table: Tensor,
    step_index: Tensor,
    flow: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None,
    reward_score: Tensor,
    beta: float,
    gamma: str,
    by_sigma: bool,
    at_prediction: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    made = _layout(vjp, flow, reward_score_next, flow_next, reward_score, at_prediction)
    check_steps(table, step_index, vjp)
    gradient_flow = _results(made, flow, with_gradient)
    partial = vjp.new_empty(made.rows, made.tiles, 1, dtype=torch.float32)
    launch(
        _reference_balance_kernel,
        made.grid,
        vjp.device,
        **made.tile_arguments(table, step_index),
        vjp=vjp,
        flow=flow,
        reward_score_next=reward_score_next,
        flow_next=flow_next,
        reward_score=reward_score,
        gradient_flow=gradient_flow if with_gradient else None,
        partial=partial,
        inverse_size=1 / made.size,
        beta=beta,
        GAMMA=GAMMAS.index(gamma),
        BY_SIGMA=by_sigma,
        AT_PREDICTION=at_prediction,
    )
    return sum_tiles(partial, sums=1).view(made.rows), gradient_flow


class _ReferenceBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flow, vjp, table, step_index, *others):
        loss, gradient_flow = reference_balance_op(vjp, table, step_index, flow, *others)
        ctx.save_for_backward(gradient_flow)
        ctx.dtype = flow.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        forbid_second_derivatives()
        (gradient_flow,) = ctx.saved_tensors
        _, flow = scale_gradients(upstream, None, gradient_flow, ctx.dtype, ctx.dtype, None)
        return flow, *(None,) * 11


def reference_balance(
    vjp: Tensor,
    table: Tensor,
    step_index: Tensor,
    flow: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None,
    reward_score: Tensor,
    *,
    beta: float,
    gamma: str,
    by_sigma: bool,
    at_prediction: bool,
) -> Tensor:
    """The loss by row, `[N]` float32, with gradients to `flow`.

    Args:
        vjp: `[N, …]`, the vector-Jacobian product of `fastnabla.kernels.reference_cotangent`.
        table, step_index: as in `fastnabla.kernels.forward_balance`.
        flow: g(x), `[N, …]`.
        reward_score_next, flow_next: ∇r(x') and g(x'), as in `fastnabla.kernels.reference_cotangent`.
        reward_score: `[N, …]`, ∇r(x), or ∂r/∂x̂0 if `at_prediction`.
        beta, gamma, by_sigma: β, γ and weighting by σ.

    Raises:
        ValueError: a tensor has the wrong device, shape, dtype or layout.

    Equivalent: `fastnabla.objective.reference_target.reference_balance`.
    """
    return _ReferenceBalance.apply(
        flow,
        vjp.detach(),
        table,
        step_index,
        reward_score_next.detach(),
        None if flow_next is None else flow_next.detach(),
        reward_score.detach(),
        beta,
        gamma,
        by_sigma,
        at_prediction,
        torch.is_grad_enabled() and flow.requires_grad,
    )
