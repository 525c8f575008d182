"""The reverse residual of residual ∇-DB with a target that follows the reference policy, in plain torch: the specification.

With the residual flow score ``h = ∇R + g`` and the reference policy's step mean μ_ref, the target of h(x) is the next state's
flow score, carried back through the reference:

    residual  g(x) + ∇R(x) − (∂μ_ref/∂x)ᵀ h(x')          trains φ
    h(x')     ∇R(x') + g(x'), a constant; ∇R(x_T) at the end

∂μ_ref/∂x = a + b ∂o_ref/∂x, so with ``p = βγ ∂r/∂x̂0`` and ``∇R(x) = c p + J_refᵀ d p`` one vector-Jacobian product of the reference
is enough. Functions and shapes are like those of `balance.py`; `objective/README.md` has the derivation.
"""

import torch
from torch import Tensor

from fastnabla.objective.balance import mean_square, residual_weight, reward_weight
from fastnabla.objective.gaussian import full, unguide
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows


def next_flow_score(
    rows: TransitionRows, reward_score_next: Tensor, flow_next: Tensor | None, objective: Objective
) -> Tensor:
    """h(x') `[N, …]`: ``βγ∇r(x') + g(x')``, without g in last rows or if `flow_next` is None."""
    score = objective.beta * reward_weight(rows.alpha_bar_next, objective.gamma) * full(reward_score_next)
    return score if flow_next is None else score + torch.where(rows.last, 0.0, full(flow_next))


@torch.no_grad()
def reference_cotangent(
    output: Tensor,
    rows: TransitionRows,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    pixel_score: Tensor | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """Cotangent of the reference policy's output pair. Its vector-Jacobian product is the part of the residual that passes
    through the network: ``J_refᵀ(d p − b h(x'))``, with p = 0 if `pixel_score` is None. It has no gradient.

    Args:
        output: the reference policy's output at x, pair `[2N, …]`; only its shape, dtype and layout are used.
        rows: table rows of the transitions.
        reward_score_next: ∇r(x') `[N, …]`.
        flow_next: g(x') `[N, …]`; None if all rows are last ones.
        pixel_score: ∂r/∂x̂0 `[N, …]`, if ∇r(x) passes through the reference network.
        objective: β and γ.
        guidance_scale: w of classifier-free guidance; None for outputs without guidance.
    """
    cotangent = -rows.b * next_flow_score(rows, reward_score_next, flow_next, objective)
    if pixel_score is not None:
        scale = objective.beta * reward_weight(rows.alpha_bar, objective.gamma)
        cotangent = cotangent + scale * rows.d * full(pixel_score)
    return unguide(cotangent, guidance_scale).to(output.dtype)


def reference_balance(
    vjp: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    reward_score: Tensor | None = None,
    pixel_score: Tensor | None = None,
    *,
    objective: Objective,
) -> Tensor:
    """Mean square `[N]` of the residual ``g(x) + ∇R(x) − (∂μ_ref/∂x)ᵀ h(x')``. Gradients flow only to g(x).

    Args:
        vjp: vector-Jacobian product of `reference_cotangent`, `[N, …]`.
        rows: table rows of the transitions.
        flow: g(x) `[N, …]`.
        reward_score_next, flow_next: as for `reference_cotangent`.
        reward_score: ∇r(x) `[N, …]`, or None with `pixel_score`.
        pixel_score: ∂r/∂x̂0 `[N, …]`, if the remaining part of ∇r(x) is in `vjp` or is left out.
        objective: β, γ and the units of the residuals.
    """
    with torch.no_grad():
        scale = objective.beta * reward_weight(rows.alpha_bar, objective.gamma)
        reward = scale * (rows.c * full(pixel_score) if reward_score is None else full(reward_score))
        constant = full(vjp) - rows.a * next_flow_score(rows, reward_score_next, flow_next, objective) + reward
    return mean_square(residual_weight(rows, objective.weighting) * (full(flow) + constant))
