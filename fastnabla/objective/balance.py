"""Residual ∇-DB (arXiv 2412.07775), per transition, in plain torch: the specification.

With ``s_θ = ∇_{x'} log P_θ(x'|x)`` the score of a step in its end, ``s̄_θ = ∇_x log P_θ(x'|x)`` the score in its
start, λ the weight of the pretrained policy, g the learned flow score, ∇R = βγ∇r the scaled reward score:

    forward   s_θ − λ s_ref − g(x') − ∇R(x')          trains θ and φ
    reverse   λ (s̄_θ − s̄_ref) + g(x) + ∇R(x)          trains φ
    terminal  g(x_T), on the last transition           trains φ
    trust     o_θ − o_old                              trains θ

The last transition has no g in its forward residual, and no reverse residual. Every function takes rows of a
`TransitionTable` (`table.rows(step_index, x)`), computes in float32 (float64 if the inputs are) and returns values
by row. The derivation is in `objective/README.md`; shapes are those of `objective/gaussian.py`.
"""

import dataclasses

import torch
from torch import Tensor

from fastnabla.objective.gaussian import full, guide, step_score, unguide
from fastnabla.objective.settings import Gamma, Weighting
from fastnabla.transition import TransitionRows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The constants of the balance conditions."""

    guidance_scale: float | None
    """w of classifier-free guidance; None for outputs without guidance."""
    beta: float
    """β, the reward scale."""
    gamma: Gamma = "alpha_bar"
    """γ, weight of the reward score by signal share ᾱ."""
    prior_weight: float = 1.0
    """λ, weight of the pretrained policy's score."""
    weighting: Weighting = "score"
    """Units of the residuals: 1/σ, or with "sigma" those of the step's noise."""
    trust_region_weight: float = 0.0
    """κ, weight of the trust region."""


def reward_weight(alpha_bar: Tensor, gamma: Gamma) -> Tensor:
    """γ: how much the reward of the predicted clean sample counts at signal share ᾱ (arXiv 2412.07775)."""
    if gamma == "alpha_bar":
        return alpha_bar
    return alpha_bar.sqrt() if gamma == "sqrt_alpha_bar" else torch.ones_like(alpha_bar)


def residual_weight(rows: TransitionRows, weighting: Weighting) -> Tensor | float:
    """What the score residuals of a step are multiplied by: 1, or σ so that steps count in units of their noise."""
    return rows.sigma if weighting == "sigma" else 1.0


def mean_square(residual: Tensor) -> Tensor:
    """Mean over all but the first axis of the squares."""
    return residual.flatten(1).square().mean(1)


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm by row."""
    return tensor.flatten(1).norm(dim=1)


def score_residual(
    o: Tensor, o_ref: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows, prior_weight: float
) -> Tensor:
    """``s_θ − λ s_ref``, with the x'/σ² that both carry cancelled by hand.

    For λ = 1 it is ``(b/σ²)(o_θ − o_ref)``; subtracting two scores would lose the digits that x'/σ² occupies.
    """
    residual = rows.b / rows.sigma**2 * (o - prior_weight * o_ref)
    if prior_weight != 1.0:
        residual = residual + (1 - prior_weight) * (rows.a * full(x) - full(x_next)) / rows.sigma**2
    return residual


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBalance:
    """Per-row results `[N]` of `forward_balance`; only `loss` carries gradients."""

    loss: Tensor
    """forward + terminal + κ trust."""
    forward: Tensor
    """Mean square of the (weighted) forward residual."""
    terminal: Tensor
    """Mean square of the (weighted) g(x_T) in last rows, 0 in others."""
    trust: Tensor
    """Mean square of o_θ − o_old; zeros without an old output."""
    norm_ref: Tensor
    """‖λ s_ref‖."""
    norm_residual: Tensor
    """‖s_θ − λ s_ref‖."""
    norm_reward: Tensor
    """‖βγ∇r(x')‖."""
    norm_target: Tensor
    """‖λ s_ref + g(x') + βγ∇r(x')‖."""
    max_residual: Tensor
    """Largest absolute entry of the (weighted) forward residual."""


def forward_balance(
    output: Tensor,
    output_ref: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionRows,
    reward_score: Tensor,
    flow: Tensor | None = None,
    output_old: Tensor | None = None,
    *,
    weights: Weights,
) -> ForwardBalance:
    """Forward residual, terminal term and trust region of N transitions; gradients flow to `output` and `flow`.

    Args:
        output: policy's output at x, pair `[2N, …]`.
        output_ref: reference policy's output at x, pair `[2N, …]`.
        x, x_next: the transition's two states `[N, …]`.
        rows: the table's rows of the transitions.
        reward_score: ∇r(x') `[N, …]`, without gradient.
        flow: g(x') `[N, …]`, last rows included; None for g ≡ 0.
        output_old: guided output `[N, …]` of the policy that sampled the transition.
        weights: w, β, γ, λ, κ and the residuals' units.
    """
    o, unit = guide(output, weights.guidance_scale), residual_weight(rows, weights.weighting)
    o_ref = guide(output_ref, weights.guidance_scale).detach()
    reward_score = weights.beta * reward_weight(rows.alpha_bar_next, weights.gamma) * full(reward_score.detach())
    difference = score_residual(o, o_ref, x.detach(), x_next.detach(), rows, weights.prior_weight)
    zero = torch.zeros_like(reward_score)
    flow_inner, flow_last = (zero, zero) if flow is None else (full(flow), zero)
    if flow is not None:
        flow_inner, flow_last = torch.where(rows.last, zero, flow_inner), torch.where(rows.last, flow_inner, zero)
    residual = unit * (difference - flow_inner - reward_score)
    forward, terminal = mean_square(residual), mean_square(unit * flow_last)
    trust = mean_square(zero if output_old is None else o - full(output_old.detach()))
    loss = forward + terminal + weights.trust_region_weight * trust
    with torch.no_grad():
        score_ref = weights.prior_weight * step_score(o_ref, x, x_next, rows)
        return ForwardBalance(
            loss=loss,
            forward=forward.detach(),
            terminal=terminal.detach(),
            trust=trust.detach(),
            norm_ref=norm(score_ref),
            norm_residual=norm(difference),
            norm_reward=norm(reward_score),
            norm_target=norm(score_ref + flow_inner + reward_score),
            max_residual=residual.flatten(1).abs().amax(1),
        )


def reverse_cotangent(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionRows,
    pixel_score: Tensor | None = None,
    *,
    weights: Weights,
) -> Tensor:
    """Cotangent of a policy's output pair: its vector-Jacobian product is ``λ s̄`` or, given the `pixel_score`,
    ``λ s̄ + ∇R(x)``, but for their direct parts. Without gradient, in the dtype of the output.

    With ``e = (x' − a x − b o)/σ²`` and ``p = βγ ∂r/∂x̂0``: ``λ s̄ + ∇R = λ a e + c p + Jᵀ(λ b e + d p)``; this is the
    bracket, spread over the pair.

    Args:
        output: the policy's output at x, pair `[2N, …]`.
        x, x_next: the transition's two states `[N, …]`.
        rows: the table's rows of the transitions.
        pixel_score: ∂r/∂x̂0 `[N, …]`; None for a policy that the reward's gradient does not pass, p = 0.
        weights: w, β, γ, λ.
    """
    with torch.no_grad():
        score = step_score(guide(output, weights.guidance_scale), x, x_next, rows)
        cotangent = -weights.prior_weight * rows.b * score
        if pixel_score is not None:
            scale = weights.beta * reward_weight(rows.alpha_bar, weights.gamma)
            cotangent = cotangent + scale * rows.d * full(pixel_score)
        return unguide(cotangent, weights.guidance_scale).to(output.dtype)


def reverse_balance(
    score: Tensor,
    score_ref: Tensor,
    rows: TransitionRows,
    flow: Tensor,
    reward_score: Tensor | None = None,
    pixel_score: Tensor | None = None,
    outputs: tuple[Tensor, Tensor] | None = None,
    *,
    weights: Weights,
) -> Tensor:
    """Mean square `[N]` of the reverse residual ``λ (s̄_θ − s̄_ref) + g(x) + ∇R(x)``, 0 in last rows; its gradient
    flows to g alone.

    Args:
        score, score_ref: `[N, …]` s̄_θ and s̄_ref; or, if `outputs` are given, what each policy's `reverse_cotangent`
            became at x. These include λ, and lack the direct parts, which differ by
            ``λ a (e_θ − e_ref) = −λ (a b/σ²)(o_θ − o_ref)``.
        rows: the table's rows of the transitions.
        flow: g(x) `[N, …]`.
        reward_score: ∇r(x) `[N, …]`; or instead
        pixel_score: ∂r/∂x̂0 `[N, …]`, where the rest of ∇r is in `score`, or is left out.
        outputs: output pairs of policy and reference at x.
        weights: w, β, γ, λ and the residuals' units.
    """
    constants = [score, score_ref, reward_score, pixel_score, *(outputs or (None, None))]
    score, score_ref, reward_score, pixel_score, o, o_ref = (t if t is None else t.detach() for t in constants)
    pair = None if outputs is None else (o, o_ref)
    residual = reverse_residual(score, score_ref, rows, flow, reward_score, pixel_score, pair, weights=weights)
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
    weights: Weights,
) -> Tensor:
    """The residual of `reverse_balance`, `[N, …]`, in the units that `weights` says; arguments as there, none of which
    is taken for a constant."""
    scale = weights.beta * reward_weight(rows.alpha_bar, weights.gamma)
    difference = full(score) - full(score_ref)
    if outputs is None:
        difference = weights.prior_weight * difference
    else:
        change = guide(outputs[0], weights.guidance_scale) - guide(outputs[1], weights.guidance_scale)
        difference = difference - weights.prior_weight * rows.a * rows.b / rows.sigma**2 * change
    reward = scale * (rows.c * full(pixel_score) if reward_score is None else full(reward_score))
    return residual_weight(rows, weights.weighting) * (difference + reward + full(flow))
