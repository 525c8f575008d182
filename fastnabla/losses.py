"""Residual ∇-DB (arXiv 2412.07775) for your own training loop.

`residual_db_loss` takes network outputs, states, timesteps and reward gradients. It needs only torch, and diffusers if you
pass one of its schedulers.

    s̄_ref = reverse_scores(noise_pred_ref, x_t, …, retain_graph=False)      # optional: the reverse term
    s̄ = reverse_scores(noise_pred, x_t, …)
    result = residual_db_loss(noise_pred, noise_pred_ref, x_t, x_next, timesteps, table, reward_score_next, …)
    result.loss.backward()

Shapes: N transitions of any steps in one batch. States and scores are `[N, …]`. Network outputs are classifier-free guidance
*pairs* `[2N, …]` with all unconditional rows first, or `[N, …]` without guidance.
"""

import dataclasses
from typing import Any, get_args

import torch
from torch import Tensor

from fastnabla.objective.backend import select
from fastnabla.objective.gaussian import full
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.objective.settings import Backend, Gamma, Objective, Weighting
from fastnabla.transition import TransitionRows, TransitionTable, table_of

TIMESTEP_DTYPES = (torch.int64, torch.float32, torch.float64)
"""Half precision would round timesteps."""
STATISTICS = ("norm_ref", "norm_residual", "norm_reward", "norm_target", "max_residual")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResidualDBLoss:
    """The loss of N transitions, ``mean(forward + ρ reverse + terminal + κ trust_region)``, and its parts.

    The parts are unweighted, by row `[N]` and without gradients. They are zero in rows that do not have them.
    """

    loss: Tensor
    """Scalar, with gradients to `noise_pred`, `flow_score_next` and `flow_score`."""
    forward: Tensor
    """Mean square of ``s_θ − λ s_ref − g(x') − βγ'∇r(x')``, without g in last rows."""
    reverse: Tensor
    """Mean square of ``λ (s̄_θ − s̄_ref) + g(x) + βγ∇r(x)`` in inner rows."""
    terminal: Tensor
    """Mean square of g(x_T) in last rows."""
    trust_region: Tensor
    """Mean square of ``o_θ − o_old``."""
    statistics: dict[str, Tensor]
    """The `STATISTICS` of `fastnabla.objective.balance.ForwardBalance`, `[N]` each."""


def residual_db_loss(
    noise_pred: Tensor,
    noise_pred_ref: Tensor,
    x_t: Tensor,
    x_next: Tensor,
    timesteps: Tensor,
    scheduler: Any,
    reward_score_next: Tensor,
    flow_score_next: Tensor | None = None,
    noise_pred_old: Tensor | None = None,
    *,
    guidance_scale: float | None,
    beta: float,
    eta: float | None = None,
    gamma: Gamma = "alpha_bar",
    prior_weight: float = 1.0,
    weighting: Weighting = "score",
    reverse_weight: float = 1.0,
    trust_region_weight: float = 1.0,
    score_reverse: Tensor | None = None,
    score_ref_reverse: Tensor | None = None,
    reward_score: Tensor | None = None,
    flow_score: Tensor | None = None,
    backend: Backend = "auto",
) -> ResidualDBLoss:
    """Residual ∇-DB loss of N transitions x → x' of a sampler.

    Rows of different steps may be mixed. A *last* row, whose x' is the finished sample, has no g in its forward residual
    and no reverse residual, but the terminal term. Tensors are on one device and floating point of any precision; the
    arithmetic is float32 (float64 if `x_t` is).

    Args:
        noise_pred: the policy's output at x (its prediction of ε, v, the clean sample or a flow's velocity ε − x0), pair
            `[2N, …]` or `[N, …]`; gradients flow to it.
        noise_pred_ref: the pretrained policy's output, with the same shape; no gradient flows.
        x_t, x_next: the transition's states x and x', `[N, …]`.
        timesteps: timesteps of x, `[N]` int64, float32 or float64: values of `scheduler.timesteps`, or of the table's column
            `timestep`. For a flow they are 1000 t, whatever its network is called with. Those of x' follow from the sampler.
        scheduler: diffusers scheduler after `set_timesteps`, or a `TransitionTable`. A flow's scheduler stands for DDIM's rows;
            for others build the table (`TransitionTable.from_scheduler`). The table of a scheduler is computed in its first
            call (0.43 ms on a CPU for 50 steps; 5 µs afterwards), and again when its timesteps, its configuration or η
            change.
        reward_score_next: ∇_{x'} r(x̂0(x')), `[N, …]`, the raw gradient in reward per unit of latent; β and γ are
            applied here. In last rows it is ∇_{x'} r(x').
        flow_score_next: g(x') `[N, …]`, last rows included; None for g ≡ 0.
        noise_pred_old: output of the policy that sampled the transition, after guidance, `[N, …]`; None for no
            trust region.
        guidance_scale: w of classifier-free guidance; None for outputs without guidance, `[N, …]`.
        beta: β ≥ 0, the reward scale: the target distribution is p_ref · exp(β r).
        eta: η > 0, noise of DDIM steps, at most 1 for a flow; 1 if None. A `TransitionTable` has its own η and needs None.
        gamma: γ by ᾱ, which is (1 − t)² in a flow: "alpha_bar" (the paper), "sqrt_alpha_bar" or "constant".
        prior_weight: λ ≥ 0, the weight of the pretrained policy's score.
        weighting: units of the residuals: "score", 1/σ (the paper), or "sigma", multiplied by the step's σ.
        reverse_weight: ρ ≥ 0, weight of the reverse term. The term needs the next four arguments.
        trust_region_weight: κ ≥ 0, weight of the trust region.
        score_reverse, score_ref_reverse: s̄_θ and s̄_ref, `[N, …]`, from `reverse_scores`; no gradient flows.
        reward_score: ∇_x r(x̂0(x)), `[N, …]`, raw like `reward_score_next`; no gradient flows.
        flow_score: g(x), `[N, …]`.
        backend: "triton": one Triton kernel for the forward residual, trust region, statistics and their gradients, and one
            for the reverse residual. "torch": plain torch. "auto": the kernels for bfloat16, float16 or float32 tensors on
            CUDA. The logger "fastnabla" reports the choice once (INFO).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, a setting is out of range, a timestep is not
            one of the sampler's, only some of the reverse term's four arguments are given, the scheduler has no
            Gaussian step (see `TransitionTable.from_scheduler`), or backend="triton" and the kernels cannot run.

    The kernels never wait for the device. So on a GPU a timestep that is not one of the sampler's gives its row a NaN loss
    instead of raising. The kernels read tensors that are contiguous or channels-last.

    Equivalent with weighting="score", for the sampler's a, b, σ and γ of each row, `last` = (x' is finished) and
    `mean` over all but the first axis::

        o, o_ref = u + w * (c - u), u_ref + w * (c_ref - u_ref)
        s, s_ref = (-(x_next - a * x - b * p) / sigma**2 for p in (o, o_ref))
        forward = s - prior_weight * s_ref - where(last, 0, g_next) - beta * gamma_next * reward_score_next
        backward = prior_weight * (score_reverse - score_ref_reverse) + g + beta * gamma * reward_score
        loss = mean(forward**2) + rho * mean(where(last, 0, backward)**2)
        loss = loss + mean(where(last, g_next, 0)**2) + kappa * mean((o - o_old)**2)
        loss = loss.mean()

    with x'/σ² cancelled by hand in ``s − λ s_ref``: a difference of two float32 scores loses digits at small σ.
    """
    weights = {
        "beta": beta,
        "prior_weight": prior_weight,
        "reverse_weight": reverse_weight,
        "trust_region_weight": trust_region_weight,
    }
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} = {value}: expected a finite number, not negative")
    for name, value, kind in (("gamma", gamma, Gamma), ("weighting", weighting, Weighting)):
        if value not in get_args(kind):
            raise ValueError(f"{name} = {value!r}: expected one of {get_args(kind)}")
    table = _table(scheduler, eta)
    _check_states(x_t, x_next, timesteps)
    _check_output("noise_pred", noise_pred, x_t, guidance_scale)
    _check_output("noise_pred_ref", noise_pred_ref, x_t, guidance_scale)
    backward = {
        "score_reverse": score_reverse,
        "score_ref_reverse": score_ref_reverse,
        "reward_score": reward_score,
        "flow_score": flow_score,
    }
    scores = {"reward_score_next": reward_score_next, "flow_score_next": flow_score_next}
    for name, tensor in (scores | {"noise_pred_old": noise_pred_old} | backward).items():
        if tensor is not None:
            _check_tensor(name, tensor, x_t)
    missing = [name for name, tensor in backward.items() if tensor is None]
    if 0 < len(missing) < len(backward):
        raise ValueError(f"{', '.join(missing)} = None: the reverse term needs all of {', '.join(backward)}, or none")

    ops, rows = _select(backend, table, x_t, timesteps)
    settings = {"objective": Objective(gamma=gamma, weighting=weighting, **weights), "guidance_scale": guidance_scale}
    forward = ops.forward_balance(
        noise_pred, noise_pred_ref, x_t, x_next, rows, reward_score_next, flow_score_next, noise_pred_old, **settings
    )
    loss, reverse_loss = forward.loss, torch.zeros_like(forward.forward)
    if not missing:
        reverse_loss = ops.reverse_balance(score_reverse, score_ref_reverse, rows, flow_score, reward_score, **settings)
        loss = loss + reverse_weight * reverse_loss
    return ResidualDBLoss(
        loss=loss.mean(),
        forward=forward.forward,
        reverse=reverse_loss.detach(),
        terminal=forward.terminal,
        trust_region=forward.trust,
        statistics={name: getattr(forward, name) for name in STATISTICS},
    )


def reverse_scores(
    noise_pred: Tensor,
    x_t: Tensor,
    x_next: Tensor,
    timesteps: Tensor,
    scheduler: Any,
    *,
    guidance_scale: float | None,
    eta: float | None = None,
    retain_graph: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """``s̄ = ∇_x log P(x'|x)`` `[N, …]`, a step's score with respect to its start, by one backward pass to the network's input.

    Args:
        noise_pred: a policy's output at x, pair `[2N, …]` or `[N, …]`, with its graph to `x_t`.
        x_t: x, `[N, …]`, the tensor with `requires_grad` that was passed to the network (doubled for guidance).
        x_next, timesteps, scheduler, guidance_scale, eta: as in `residual_db_loss`.
        retain_graph: keep the graph of `noise_pred` for the loss's backward pass; False frees it.
        backend: as in `residual_db_loss`.

    Returns:
        s̄ without gradient, float32 (float64 if `x_t` is), in units of 1/σ.

    Raises:
        ValueError: as `residual_db_loss`, `x_t` requires no gradient, or `noise_pred` was not computed from it.

    Equivalent, for the sampler's a, b and σ of each row::

        log_prob = -((x_next - a * x_t - b * guided(noise_pred)) ** 2 / (2 * sigma**2)).sum()
        (score,) = torch.autograd.grad(log_prob, x_t)
    """
    table = _table(scheduler, eta)
    _check_states(x_t, x_next, timesteps)
    _check_output("noise_pred", noise_pred, x_t, guidance_scale)
    if not x_t.requires_grad:
        raise ValueError("x_t requires no gradient: call x_t.requires_grad_() and then the network")
    untracked = "noise_pred has no graph to x_t: call x_t.requires_grad_() and then the network, with gradients enabled"
    if not noise_pred.requires_grad:
        raise ValueError(untracked)
    ops, rows = _select(backend, table, x_t, timesteps)
    output, state = noise_pred.detach().requires_grad_(), full(x_t).detach().requires_grad_()
    with torch.enable_grad():
        log_prob = ops.gaussian_log_prob(output, state, x_next.detach(), rows, guidance_scale=guidance_scale).sum()
    direct, cotangent = torch.autograd.grad(log_prob, (state, output))
    (vjp,) = torch.autograd.grad(noise_pred, x_t, cotangent, retain_graph=retain_graph, allow_unused=True)
    if vjp is None:
        raise ValueError(untracked)
    return full(vjp) + direct


def _select(
    backend: Backend, table: TransitionTable, x_t: Tensor, timesteps: Tensor
) -> tuple[ObjectiveOps, TransitionRows]:
    ops = select(backend, x_t.device, x_t.dtype)
    check = ops is PLAIN or timesteps.device.type == "cpu"
    return ops, table.rows(table.step_index(timesteps, check), x_t)


def _table(scheduler: Any, eta: float | None) -> TransitionTable:
    if not isinstance(scheduler, TransitionTable):
        return table_of(scheduler, 1.0 if eta is None else eta)
    if eta is not None:
        raise ValueError(f"eta = {eta}: expected None with a TransitionTable, which has its own eta")
    return scheduler


def _check_states(x_t: Tensor, x_next: Tensor, timesteps: Tensor) -> None:
    if x_t.dim() < 2 or len(x_t) == 0:
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}, expected [N, …] with N ≥ 1")
    _check_tensor("x_t", x_t, x_t)
    _check_tensor("x_next", x_next, x_t)
    if timesteps.dtype not in TIMESTEP_DTYPES or timesteps.shape != x_t.shape[:1] or timesteps.device != x_t.device:
        raise ValueError(
            f"timesteps is {timesteps.dtype} {tuple(timesteps.shape)} on {timesteps.device}, "
            f"expected torch.int64, torch.float32 or torch.float64 ({len(x_t)},) on {x_t.device}"
        )


def _check_output(name: str, output: Tensor, x_t: Tensor, guidance_scale: float | None) -> None:
    if guidance_scale is None:
        return _check_tensor(name, output, x_t, " (guidance_scale=None: one row per transition)")
    if not abs(guidance_scale) < float("inf"):
        raise ValueError(f"guidance_scale = {guidance_scale}: expected a finite number, or None for no guidance")
    _check_tensor(name, output, x_t, " (pairs, unconditional rows first; guidance_scale=None for single rows)", 2)


def _check_tensor(name: str, tensor: Tensor, x_t: Tensor, hint: str = "", copies: int = 1) -> None:
    expected = (copies * len(x_t), *x_t.shape[1:])
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}{hint}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating-point dtype")
    if tensor.device != x_t.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {x_t.device}, where x_t is")
