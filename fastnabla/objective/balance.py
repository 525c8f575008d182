"""Residual ∇-DB (arXiv 2412.07775), per transition, in plain torch: the specification.

With ``s_θ = ∇_{x'} log P_θ(x'|x)`` the score of a step in its end, ``s̄_θ = ∇_x log P_θ(x'|x)`` the score in its
start, λ the pretrained strength, g the learned flow score, ∇R = βγ∇r the scaled reward score:

    forward   s_θ − λ s_ref − g(x') − ∇R(x')          trains θ and φ
    reverse   λ (s̄_θ − s̄_ref) + g(x) + ∇R(x)          trains φ
    terminal  g(x_T), on the last transition           trains φ
    trust     o_θ − o_old                              trains θ

The last transition has no g in its forward residual, and no reverse residual. Every function takes rows of a
`TransitionTable` broadcast against the state (`table.rows(step_index, x)`), computes in float32 (float64 if the
inputs are) and returns values by row. The derivation is in `objective/README.md`.

Shapes: N transitions, `[N, …]` states and scores; network outputs come as classifier-free guidance *pairs*
`[2N, …]`, all unconditional rows first, or `[N, …]` when there is no guidance (`guidance_scale=None`).
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from fastnabla.transition import TransitionTable

Weighting = Literal["score", "sigma"]
Gamma = Literal["alpha_bar", "sqrt_alpha_bar", "constant"]


def full(tensor: Tensor) -> Tensor:
    """`tensor` in the precision of the arithmetic: float32, or float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def guide(output: Tensor, guidance_scale: float | None) -> Tensor:
    """Classifier-free guidance ``o = u + w (c − u)`` of a pair `[2N, …]`, as `[N, …]`; no guidance if w is None."""
    if guidance_scale is None:
        return full(output)
    unconditional, conditional = full(output).chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def unguide(cotangent: Tensor, guidance_scale: float | None) -> Tensor:
    """The adjoint of `guide`: a cotangent `[N, …]` of o as the cotangent `[2N, …]` of the pair."""
    if guidance_scale is None:
        return cotangent
    return torch.cat([(1 - guidance_scale) * cotangent, guidance_scale * cotangent])


def reward_weight(alpha_bar: Tensor, gamma: Gamma) -> Tensor:
    """γ: how much the reward of the predicted clean sample counts at signal share ᾱ (arXiv 2412.07775)."""
    if gamma == "alpha_bar":
        return alpha_bar
    return alpha_bar.sqrt() if gamma == "sqrt_alpha_bar" else torch.ones_like(alpha_bar)


def residual_weight(rows: TransitionTable, weighting: Weighting) -> Tensor | float:
    """What the score residuals of a step are multiplied by: 1, or σ so that steps count in units of their noise."""
    return rows.sigma if weighting == "sigma" else 1.0


def mean_square(residual: Tensor) -> Tensor:
    """Mean over all but the first axis of the squares."""
    return residual.flatten(1).square().mean(1)


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm by row."""
    return full(tensor).flatten(1).norm(dim=1)


def step_score(o: Tensor, x: Tensor, x_next: Tensor, rows: TransitionTable) -> Tensor:
    """``s = −(x' − a x − b o) / σ²`` of a guided output `o [N, …]`, as the paper writes it."""
    return -(full(x_next) - rows.a * full(x) - rows.b * full(o)) / rows.sigma**2


def score_residual(
    o: Tensor, o_ref: Tensor, x: Tensor, x_next: Tensor, rows: TransitionTable, strength: float
) -> Tensor:
    """``s_θ − λ s_ref``, with the x'/σ² that both carry cancelled by hand.

    For λ = 1 it is ``(b/σ²)(o_θ − o_ref)``; subtracting two scores would lose the digits that x'/σ² occupies.
    """
    residual = rows.b / rows.sigma**2 * (o - strength * o_ref)
    if strength != 1.0:
        residual = residual + (1 - strength) * (rows.a * full(x) - full(x_next)) / rows.sigma**2
    return residual


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBalance:
    """Per-row results `[N]` of `forward_balance`; the losses carry gradients, the statistics none."""

    loss: Tensor
    """Mean square of the (weighted) forward residual."""
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
    rows: TransitionTable,
    reward_score_next: Tensor,
    flow_next: Tensor | None = None,
    output_old: Tensor | None = None,
    *,
    guidance_scale: float | None,
    strength: float = 1.0,
    weighting: Weighting = "score",
) -> ForwardBalance:
    """Forward residual and trust region of N transitions; gradients flow to `output` and `flow_next`.

    Args:
        output: policy's output at x, pair `[2N, …]`.
        output_ref: reference policy's output at x, pair `[2N, …]`.
        x, x_next: the transition's two states `[N, …]`.
        rows: the table's rows of the transitions.
        reward_score_next: βγ∇r(x') `[N, …]`, without gradient.
        flow_next: g(x') `[N, …]`; None where g ≡ 0 (no flow network, or last transitions).
        output_old: guided output `[N, …]` of the policy that sampled the transition.
        guidance_scale: w, or None for outputs without guidance.
        strength: λ.
        weighting: "score" or "sigma".
    """
    o = guide(output, guidance_scale)
    o_ref = guide(output_ref, guidance_scale).detach()
    difference = score_residual(o, o_ref, x, x_next, rows, strength)
    target = full(reward_score_next) if flow_next is None else full(reward_score_next) + full(flow_next)
    residual = residual_weight(rows, weighting) * (difference - target)
    loss = mean_square(residual)
    trust = torch.zeros_like(loss) if output_old is None else mean_square(o - full(output_old))
    with torch.no_grad():
        score_ref = strength * step_score(o_ref, x, x_next, rows)
        return ForwardBalance(
            loss=loss,
            trust=trust,
            norm_ref=norm(score_ref),
            norm_residual=norm(difference),
            norm_reward=norm(reward_score_next),
            norm_target=norm(score_ref + target),
            max_residual=residual.flatten(1).abs().amax(1),
        )


def reverse_cotangent(
    output: Tensor,
    x: Tensor,
    x_next: Tensor,
    rows: TransitionTable,
    pixel_score: Tensor | None = None,
    *,
    guidance_scale: float | None,
    strength: float,
) -> Tensor:
    """Cotangent of the output pair for which one vector-Jacobian product yields ``λ s̄ + ∇R(x)``, but for its direct part.

    With ``e = (x' − a x − b o)/σ²`` and ``p = βγ ∂r/∂x̂0`` (`pixel_score [N, …]`, None without a reward at x):
    ``λ s̄ + ∇R = λ a e + c p + Jᵀ(λ b e + d p)``; this is the bracket, spread over the pair.
    """
    cotangent = -strength * rows.b * step_score(guide(output, guidance_scale), x, x_next, rows)
    if pixel_score is not None:
        cotangent = cotangent + rows.d * pixel_score
    return unguide(cotangent, guidance_scale).to(output.dtype)


def reverse_balance(
    output: Tensor,
    output_ref: Tensor,
    rows: TransitionTable,
    vjp: Tensor,
    vjp_ref: Tensor,
    direct_reward_score: Tensor,
    flow: Tensor,
    *,
    guidance_scale: float | None,
    strength: float = 1.0,
    weighting: Weighting = "score",
) -> Tensor:
    """Mean square `[N]` of the reverse residual ``λ (s̄_θ − s̄_ref) + g(x) + ∇R(x)``; its gradient flows to g alone.

    The direct parts of the two scores differ by ``λ a (e_θ − e_ref) = −λ (a b/σ²)(o_θ − o_ref)``.

    Args:
        output, output_ref: output pairs at x.
        rows: the table's rows of the transitions.
        vjp, vjp_ref: what the `reverse_cotangent`s of policy and reference became at x, `[N, …]`.
        direct_reward_score: the part of ∇R(x) that is not in `vjp`: ``c p``, or all of ∇R where it does not pass the UNet.
        flow: g(x) `[N, …]`.
        guidance_scale, strength, weighting: as in `forward_balance`.
    """
    with torch.no_grad():
        change = guide(output, guidance_scale) - guide(output_ref, guidance_scale)
        known = full(vjp) - full(vjp_ref) - strength * rows.a * rows.b / rows.sigma**2 * change
        known = known + full(direct_reward_score)
    return mean_square(residual_weight(rows, weighting) * (known + full(flow)))


def terminal_balance(flow_next: Tensor, rows: TransitionTable, *, weighting: Weighting = "score") -> Tensor:
    """Mean square `[N]` of g(x_T), for last transitions."""
    return mean_square(residual_weight(rows, weighting) * full(flow_next))
