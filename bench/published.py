"""The objective's operations as in the published algorithm: the baseline for the kernels.

Residual ∇-DB as in arXiv 2412.07775. As in the authors' code, the scores of both policies are computed whole, as
``−(x' − μ)/σ²``, and then subtracted, and the losses are separate mean squares, with masks for last rows. Everything is plain
torch with autograd. Signatures, results and precision are those of `fastnabla.objective.ops.PLAIN`. The statistics are
computed too, so that the compared work is the same. The paper has no operations like those of `reference_target.py`, for which
the baseline is their specification.

The baseline gets improvements that cost nothing: coefficients are gathered once, as rows `[N, 1, 1, 1]`; means are
``a x + b o``, while the authors' sampler goes through the predicted clean sample; and there are no unnecessary copies.
"""

import functools
import math

import torch
from torch import Tensor

from fastnabla.objective.balance import ForwardBalance, mean_square, norm, residual_weight, reward_weight
from fastnabla.objective.gaussian import full, guide, step_score, unguide
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows, TransitionTable


@functools.cache
def ddim_table(steps: int = 50, eta: float = 1.0) -> TransitionTable:
    """DDIM with Stable Diffusion's betas, epsilon-prediction, and leading timesteps with an offset of 1. Written out, so that
    diffusers need not be installed."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = (1 - betas).cumprod(0).double()
    timestep = torch.arange(steps - 1, -1, -1) * (1000 // steps) + 1
    timestep_next = (timestep - 1000 // steps).clamp(min=0)
    now, then = alphas[timestep], alphas[timestep_next]
    sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    c, d = now.rsqrt(), -((1 - now) / now).sqrt()
    finished = timestep_next == 0
    return TransitionTable(
        timestep=timestep.float(),
        timestep_next=timestep_next.float(),
        a=then.sqrt() * c,
        b=then.sqrt() * d + (1 - then - sigma**2).sqrt(),
        sigma=sigma,
        c=c,
        d=d,
        c_next=torch.where(finished, 1.0, then.rsqrt()),
        d_next=torch.where(finished, 0.0, -((1 - then) / then).sqrt()),
        alpha_bar=now,
        alpha_bar_next=then,
        noise_std=(1 - now).sqrt(),
        noise_std_next=(1 - then).sqrt(),
    )


def guided_step(
    output: Tensor, x: Tensor, noise: Tensor, rows: TransitionRows, *, guidance_scale: float | None
) -> tuple[Tensor, Tensor]:
    """As `gaussian.guided_step`: guidance, mean and noise."""
    o = guide(output, guidance_scale)
    mean = rows.a * full(x) + rows.b * o
    return (mean + rows.sigma * full(noise)).to(x.dtype), o


def gaussian_log_prob(
    output: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows, *, guidance_scale: float | None
) -> Tensor:
    """As `gaussian.gaussian_log_prob`: elementwise log-densities, then summed."""
    mean = rows.a * full(x) + rows.b * guide(output, guidance_scale)
    normaliser = rows.sigma.log() + 0.5 * math.log(2 * math.pi)
    return (-((full(x_next) - mean) ** 2) / (2 * rows.sigma**2) - normaliser).flatten(1).sum(1)


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
    """As `balance.forward_balance`: two whole scores, their difference from the target, and three losses."""
    unit, last = residual_weight(rows, objective.weighting), rows.last.float()
    o = guide(output, guidance_scale)
    score = step_score(o, x, x_next, rows)
    with torch.no_grad():
        score_ref = objective.prior_weight * step_score(guide(output_ref, guidance_scale), x, x_next, rows)
        reward = objective.beta * reward_weight(rows.alpha_bar_next, objective.gamma) * full(reward_score_next)
    target = score_ref + reward
    nothing = torch.zeros(len(x), device=x.device)
    terminal = trust = nothing
    if flow_next is not None:
        target = target + (1 - last) * full(flow_next)
        terminal = mean_square(unit * last * full(flow_next))
    if output_old is not None:
        trust = mean_square(o - full(output_old))
    residual = unit * (score - target)
    forward = mean_square(residual)
    loss = forward + terminal + objective.trust_region_weight * trust
    with torch.no_grad():
        return ForwardBalance(
            loss=loss,
            forward=forward.detach(),
            terminal=terminal.detach(),
            trust=trust.detach(),
            norm_ref=norm(score_ref),
            norm_residual=norm(score - score_ref),
            norm_reward=norm(reward),
            norm_target=norm(target),
            max_residual=residual.flatten(1).abs().amax(1),
        )


@torch.no_grad()
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
    """As `balance.reverse_cotangent`, computed as autograd would: the whole score, propagated back to the output through the
    mean and the guidance."""
    cotangent = -objective.prior_weight * rows.b * step_score(guide(output, guidance_scale), x, x_next, rows)
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
    """As `balance.reverse_balance`: both policies' scores are computed whole before they are subtracted.

    With `outputs`, an output's direct contribution to its score is ``−λ (a b/σ²) o``. The rest of the direct part,
    ``λ a (x' − a x)/σ²``, is omitted: it is the same in both scores, and its states are not among the arguments.
    """
    with torch.no_grad():
        if outputs is None:
            whole, whole_ref = objective.prior_weight * full(score), objective.prior_weight * full(score_ref)
        else:
            direct = objective.prior_weight * rows.a * rows.b / rows.sigma**2
            whole = full(score) - direct * guide(outputs[0], guidance_scale)
            whole_ref = full(score_ref) - direct * guide(outputs[1], guidance_scale)
        reward = rows.c * full(pixel_score) if reward_score is None else full(reward_score)
        reward = objective.beta * reward_weight(rows.alpha_bar, objective.gamma) * reward
    residual = whole - whole_ref + full(flow) + reward
    return mean_square((1 - rows.last.float()) * residual_weight(rows, objective.weighting) * residual)


PUBLISHED: ObjectiveOps = PLAIN._replace(
    name="published algorithm, eager torch",
    guided_step=guided_step,
    gaussian_log_prob=gaussian_log_prob,
    forward_balance=forward_balance,
    reverse_cotangent=reverse_cotangent,
    reverse_balance=reverse_balance,
)
