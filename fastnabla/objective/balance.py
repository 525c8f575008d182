"""Residual ∇-DB (arXiv 2412.07775), per transition, in plain torch: the specification.

``s_θ = ∇_{x'} log P_θ(x'|x)`` is a step's score with respect to its end, ``s̄_θ = ∇_x log P_θ(x'|x)`` with respect to its
start. λ is the weight of the pretrained policy, g the learned flow score, and ∇R = βγ∇r the scaled reward score:

    forward   s_θ − λ s_ref − g(x') − ∇R(x')          trains θ and φ
    reverse   λ (s̄_θ − s̄_ref) + g(x) + ∇R(x)          trains φ
    terminal  g(x_T), on the last transition           trains φ
    trust     o_θ − o_old                              trains θ

The last transition has no g in its forward residual and no reverse residual. Every function takes rows of a
`TransitionTable` (`table.rows(step_index, x)`), computes in float32 (float64 for float64 inputs) and returns one value
per row. `objective/README.md` has the derivation; shapes are those of `objective/gaussian.py`.
"""

import dataclasses

import torch
from torch import Tensor

from fastnabla.objective.gaussian import full, guide, step_score, unguide
from fastnabla.objective.settings import Gamma, Objective, Weighting
from fastnabla.transition import TransitionRows


def reward_weight(alpha_bar: Tensor, gamma: Gamma) -> Tensor:
    """γ: the weight of the predicted clean sample's reward at ᾱ, the squared signal (arXiv 2412.07775)."""
    if gamma == "alpha_bar":
        return alpha_bar
    return alpha_bar.sqrt() if gamma == "sqrt_alpha_bar" else torch.ones_like(alpha_bar)


def residual_weight(rows: TransitionRows, weighting: Weighting) -> Tensor | float:
    """The factor of a step's score residuals: 1, or σ to express them in units of the step's noise."""
    return rows.sigma if weighting == "sigma" else 1.0


def mean_square(residual: Tensor) -> Tensor:
    """Mean of the squares, by row."""
    return residual.flatten(1).square().mean(1)


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm by row."""
    return tensor.flatten(1).norm(dim=1)


def score_residual(
    o: Tensor, o_ref: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows, prior_weight: float
) -> Tensor:
    """``s_θ − λ s_ref``, with the common term x'/σ² cancelled by hand.

    For λ = 1 it is ``(b/σ²)(o_θ − o_ref)``. Subtracting two scores would lose the digits that x'/σ² occupies.
    """
    residual = rows.b / rows.sigma**2 * (o - prior_weight * o_ref)
    if prior_weight != 1.0:
        residual = residual + (1 - prior_weight) * (rows.a * full(x) - full(x_next)) / rows.sigma**2
    return residual


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBalance:
    """Results of `forward_balance` by row, `[N]`. Only `loss` carries gradients."""

    loss: Tensor
    """forward + terminal + κ trust."""
    forward: Tensor
    """Mean square of the (weighted) forward residual."""
    terminal: Tensor
    """Mean square of the (weighted) g(x_T) in last rows; 0 elsewhere."""
    trust: Tensor
    """Mean square of o_θ − o_old; 0 without `output_old`."""
    norm_ref: Tensor
    """‖λ s_ref‖."""
    norm_residual: Tensor
    """‖s_θ − λ s_ref‖."""
    norm_reward: Tensor
    """‖βγ∇r(x')‖."""
    norm_target: Tensor
    """‖λ s_ref + g(x') + βγ∇r(x')‖."""
    max_residual: Tensor
    """Largest absolute element of the (weighted) forward residual."""


def forward_balance(
    output: Tensor,
    output_ref: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionRows,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    output_old: Tensor | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> ForwardBalance:
    """Forward residual, terminal term and trust region of N transitions. Gradients flow to `output` and `flow_next`.

    Args:
        output: policy's output at x, pair `[2N, …]`.
        output_ref: reference policy's output at x, pair `[2N, …]`.
        x, x_next: states `[N, …]` of the transitions.
        rows: table rows of the transitions.
        reward_score_next: ∇r(x') `[N, …]`; no gradient flows.
        flow_next: g(x') `[N, …]`, last rows included; None for g ≡ 0.
        output_old: guided output `[N, …]` of the policy that sampled the transition; None for no trust region.
        objective: β, γ, λ, κ and the units of the residuals.
        guidance_scale: w of classifier-free guidance; None for outputs without guidance.
    """
    o, unit = guide(output, guidance_scale), residual_weight(rows, objective.weighting)
    o_ref = guide(output_ref, guidance_scale).detach()
    reward = objective.beta * reward_weight(rows.alpha_bar_next, objective.gamma) * full(reward_score_next.detach())
    difference = score_residual(o, o_ref, x.detach(), x_next.detach(), rows, objective.prior_weight)
    zero = torch.zeros_like(reward)
    flow_inner, flow_last = (zero, zero) if flow_next is None else (full(flow_next), zero)
    if flow_next is not None:
        flow_inner, flow_last = torch.where(rows.last, zero, flow_inner), torch.where(rows.last, flow_inner, zero)
    residual = unit * (difference - flow_inner - reward)
    forward, terminal = mean_square(residual), mean_square(unit * flow_last)
    trust = mean_square(zero if output_old is None else o - full(output_old.detach()))
    loss = forward + terminal + objective.trust_region_weight * trust
    with torch.no_grad():
        score_ref = objective.prior_weight * step_score(o_ref, x, x_next, rows)
        return ForwardBalance(
            loss=loss,
            forward=forward.detach(),
            terminal=terminal.detach(),
            trust=trust.detach(),
            norm_ref=norm(score_ref),
            norm_residual=norm(difference),
            norm_reward=norm(reward),
            norm_target=norm(score_ref + flow_inner + reward),
            max_residual=residual.flatten(1).abs().amax(1),
        )


def reverse_cotangent(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionRows,
    pixel_score: Tensor | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """Cotangent of a policy's output pair. Its vector-Jacobian product is the part of ``λ s̄`` that passes through the
    network, or with `pixel_score` the part of ``λ s̄ + ∇R(x)``. It has no gradient, and the dtype of `output`.

    With ``e = (x' − a x − b o)/σ²`` and ``p = βγ ∂r/∂x̂0``: ``λ s̄ + ∇R = λ a e + c p + Jᵀ(λ b e + d p)``. This function
    returns the bracket, mapped to the pair.

    Args:
        output: the policy's output at x, pair `[2N, …]`.
        x, x_next: states `[N, …]` of the transitions.
        rows: table rows of the transitions.
        pixel_score: ∂r/∂x̂0 `[N, …]`; None for p = 0, if the reward's gradient does not pass through this policy.
        objective: β, γ and λ.
        guidance_scale: w of classifier-free guidance; None for outputs without guidance.
    """
    with torch.no_grad():
        score = step_score(guide(output, guidance_scale), x, x_next, rows)
        cotangent = -objective.prior_weight * rows.b * score
        if pixel_score is not None:
            scale = objective.beta * reward_weight(rows.alpha_bar, objective.gamma)
            cotangent = cotangent + scale * rows.d * full(pixel_score)
        return unguide(cotangent, guidance_scale).to(output.dtype)


def reverse_balance(
    score: Tensor,
    score_ref: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score: Tensor | None = None,
    pixel_score: Tensor | None = None,
    outputs: tuple[Tensor, Tensor] | None = None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """Mean square `[N]` of the reverse residual ``λ (s̄_θ − s̄_ref) + g(x) + ∇R(x)``, 0 in last rows. Gradients flow only
    to g.

    Args:
        score, score_ref: s̄_θ and s̄_ref `[N, …]`. With `outputs`, the vector-Jacobian products at x of each policy's
            `reverse_cotangent` instead. These include λ but not the direct parts, whose difference
            ``λ a (e_θ − e_ref) = −λ (a b/σ²)(o_θ − o_ref)`` is computed here.
        rows: table rows of the transitions.
        flow: g(x) `[N, …]`.
        reward_score: ∇r(x) `[N, …]`, or None with `pixel_score`.
        pixel_score: ∂r/∂x̂0 `[N, …]`, if the remaining part of ∇r is in `score` or is left out.
        outputs: output pairs of policy and reference at x.
        objective: β, γ, λ and the units of the residuals.
        guidance_scale: w of classifier-free guidance; None for outputs without guidance.
    """
    constants = [score, score_ref, reward_score, pixel_score, *(outputs or (None, None))]
    score, score_ref, reward_score, pixel_score, o, o_ref = (t if t is None else t.detach() for t in constants)
    pair = None if outputs is None else (o, o_ref)
    residual = reverse_residual(
        score,
        score_ref,
        rows,
        flow,
        reward_score,
        pixel_score,
        pair,
        objective=objective,
        guidance_scale=guidance_scale,
    )
    return mean_square(torch.where(rows.last, 0.0, residual))


def reverse_residual(
    score: Tensor,
    score_ref: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score: Tensor | None,
    pixel_score: Tensor | None,
    outputs: tuple[Tensor, Tensor] | None,
    *,
    objective: Objective,
    guidance_scale: float | None,
) -> Tensor:
    """The residual of `reverse_balance`, `[N, …]`, in the units of `objective.weighting`. It has the same arguments;
    gradients flow to all of them."""
    scale = objective.beta * reward_weight(rows.alpha_bar, objective.gamma)
    difference = full(score) - full(score_ref)
    if outputs is None:
        difference = objective.prior_weight * difference
    else:
        change = guide(outputs[0], guidance_scale) - guide(outputs[1], guidance_scale)
        difference = difference - objective.prior_weight * rows.a * rows.b / rows.sigma**2 * change
    reward = scale * (rows.c * full(pixel_score) if reward_score is None else full(reward_score))
    return residual_weight(rows, objective.weighting) * (difference + reward + full(flow))
