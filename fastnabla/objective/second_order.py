"""The reverse residual with its gradient to θ.

``s̄_θ = ∇_x log P_θ(x'|x) = a e_θ + J_θᵀ b e_θ`` depends on θ by the output in e and by the Jacobian J. First order, as
in `balance.py`, it is a constant; here it is not, and its gradient takes a backward pass through the
vector-Jacobian product. The reward's score stays a constant, as in the forward residual.

Plain torch: the kernels have no second derivatives.
"""

import torch
from torch import Tensor

from fastnabla.objective.balance import Weights, mean_square, reverse_residual
from fastnabla.objective.gaussian import guide, step_score, unguide
from fastnabla.transition import TransitionRows


def score_cotangent(output: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows, *, weights: Weights) -> Tensor:
    """As `balance.reverse_cotangent` without a pixel score, ``λ b e_θ`` spread over the pair, but with gradients to
    `output`."""
    score = step_score(guide(output, weights.guidance_scale), x, x_next, rows)
    return unguide(-weights.prior_weight * rows.b * score, weights.guidance_scale).to(output.dtype)


def reverse_balance(
    vjp: Tensor,
    vjp_ref: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score: Tensor | None,
    pixel_score: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    *,
    weights: Weights,
) -> Tensor:
    """As `balance.reverse_balance`, with gradients to `vjp` and to the policy's output too."""
    residual = reverse_residual(vjp, vjp_ref, rows, flow, reward_score, pixel_score, outputs, weights=weights)
    return mean_square(torch.where(rows.last, 0.0, residual))
