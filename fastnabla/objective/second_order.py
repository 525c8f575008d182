"""The reverse residual with its gradient to θ.

``s̄_θ = ∇_x log P_θ(x'|x) = a e_θ + J_θᵀ b e_θ`` depends on θ through the output in e and through the Jacobian J. In
first order (`balance.py`) it is a constant. Here its gradient is a backward pass through the vector-Jacobian product.
The reward score remains a constant, as in the forward residual.

This is plain torch, because the kernels have no second derivatives.
"""

import torch
from torch import Tensor

from fastnabla.objective.balance import mean_square, reverse_residual
from fastnabla.objective.gaussian import guide, step_score, unguide
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows


def score_cotangent(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionRows,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """``λ b e_θ`` mapped to the pair: `balance.reverse_cotangent` without a pixel score, with gradients to `output`."""
    score = step_score(guide(output, guidance_scale), x, x_next, rows)
    return unguide(-objective.prior_weight * rows.b * score, guidance_scale).to(output.dtype)


def reverse_balance(
    vjp: Tensor,
    vjp_ref: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score: Tensor | None,
    pixel_score: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """`balance.reverse_balance`, with gradients to `vjp` and to the policy's output as well."""
    residual = reverse_residual(
        vjp, vjp_ref, rows, flow, reward_score, pixel_score, outputs, objective=objective, guidance_scale=guidance_scale
    )
    return mean_square(torch.where(rows.last, 0.0, residual))
