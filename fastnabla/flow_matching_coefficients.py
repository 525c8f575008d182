"""The coefficients of `fastnabla.transition.TransitionTable` for flow matching, from a diffusers scheduler.

A rectified flow (arXiv 2209.03003) noises data as ``x = (1 − t) x0 + t ε``, and its network predicts the velocity ``o = ε − x0``.
So ``x̂0 = x − t o`` and ``ε̂ = x + (1 − t) o``. Time t is what diffusers' `FlowMatchEulerDiscreteScheduler` calls σ. A step goes
from t to s < t, with Δ = t − s. η is the scale of its noise:

| rows       | step                                                                    | noise                              |
|------------|-------------------------------------------------------------------------|------------------------------------|
| "ddim"     | (1 − s) x̂0 + r ε̂ + σ z, r² = s² − σ² (DDIM's, arXiv 2010.02502)         | σ² = η² s² (1 − s²(1−t)²/t²(1−s)²) |
| "cps"      | the same, "coefficients preserved" (arXiv 2509.05952)                   | σ = s sin(ηπ/2)                    |
| "flow-sde" | Euler–Maruyama, diffusion g² = η² t/(1−t) (Flow-GRPO, arXiv 2505.05470) | σ = g √Δ                           |
| "dance"    | Euler–Maruyama, diffusion g = η (DanceGRPO, arXiv 2505.07818)           | σ = g √Δ                           |
| "euler"    | x − Δ o, Euler's step of the ODE: diffusers' own sampler                | none                               |

Euler–Maruyama steps are ``x' = x − Δ [o + (g²/2t)(x + (1 − t) o)] + g √Δ z``. As η goes to 0, they all go to Euler's step.
"ddim" with η = 1 is DDPM, the posterior of the noising process, and makes x_T independent of x_0 (`TransitionTable.memory`).

At s = 0 "ddim" and "cps" have no noise. There the last row is ``x' = x̂0 + σ z`` with σ = min(0.02, t), so that it has a density.
Evaluation takes its mean, x̂0 (`TransitionTable.ends_at_prediction`). Euler–Maruyama's last rows have noise, and are as the formulas
say, in evaluation too: their means are ``x̂0 − (g²/2) ε̂``, which the noise makes up for. "euler" has no noise and no density in any
row.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
FINAL_SIGMA = 0.02
"""Largest σ of a last row that would have no noise."""
ROUNDING = 1e-6
"""Shifting takes σ = 1 to within this of 1: diffusers computes it in float32."""

FlowRows = Literal["ddim", "flow-sde", "dance", "cps", "euler"]
Coefficients = tuple[Tensor, Tensor, Tensor]


def flow_matching_coefficients(
    scheduler: Any, num_inference_steps: int | None, eta: float, rows: FlowRows, mu: float | None, end: float
) -> dict[str, Tensor]:
    """The columns of a `TransitionTable` by name, `[T]` each; see `TransitionTable.from_scheduler`.

    Raises:
        ValueError: a setting is not supported or out of range, `mu` is missing or has no effect, or the scheduler's noise
            levels do not fall from at most 1 to 0.
    """
    _check_settings(scheduler.config, rows, eta)
    t, timestep = _noise_levels(scheduler, num_inference_steps, mu)
    if not 0 <= end < t[-1]:
        raise ValueError(
            f"end = {end}: must be at least 0 and below the noise level of the last step, {t[-1].item():.3g}."
        )
    s, count = torch.cat([t[1:], t.new_tensor([end])]), scheduler.config.num_train_timesteps
    a, b, sigma = ROWS[rows](t, s, eta)
    finished = torch.arange(len(t)) == len(t) - 1
    # The noise that a step to s = 0 leaves in the finished sample; s itself in the other rows.
    left = ((a * t + b).square() + sigma.square()).sqrt()
    return {
        "timestep": timestep,
        "timestep_next": torch.cat([timestep[1:], timestep.new_tensor([end * count])]),
        "a": a,
        "b": b,
        "sigma": sigma,
        "c": torch.ones_like(t),
        "d": -t,
        "c_next": torch.ones_like(t),
        "d_next": torch.where(finished, 0.0, -s),
        "alpha_bar": (1 - t).square(),
        "alpha_bar_next": (1 - s).square(),
        "noise_std": t,
        "noise_std_next": torch.where(s > 0, s, left),
    }


def dynamic_shift(tokens: int, config: Any) -> float:
    """μ of resolution-dependent shifting, linear in the number of tokens of an image.

    Args:
        tokens: number of tokens that the network sees; with patches of 2×2 latents it is H/2 · W/2.
        config: a `FlowMatchEulerDiscreteScheduler`'s; μ goes from `base_shift` at `base_image_seq_len` to `max_shift` at
            `max_image_seq_len`.
    """
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def _check_settings(config: Any, rows: str, eta: float) -> None:
    if rows not in get_args(FlowRows):
        raise ValueError(f"rows = {rows!r}: must be one of {', '.join(get_args(FlowRows))}.")
    if rows == "euler" and eta != 1:
        raise ValueError(f"eta = {eta}: has no effect with rows = 'euler', whose steps have no noise. Leave it at 1.")
    largest = 1.0 if rows in ("ddim", "cps") else math.inf
    if not (0 < eta <= largest and eta < math.inf):
        limits = "above 0 and at most 1" if largest == 1 else "positive and finite"
        raise ValueError(f"eta = {eta}: must be {limits} with rows = {rows!r}. Without noise a step has no density.")
    if config.stochastic_sampling:
        raise ValueError(
            "scheduler setting stochastic_sampling=True: it chooses another step than rows does. Set "
            "stochastic_sampling=False; its step is that of rows='cps' with eta=1."
        )
    if config.invert_sigmas:
        raise ValueError(
            "scheduler setting invert_sigmas=True: the noise levels would rise, and time would be 1 − t. Set "
            "invert_sigmas=False."
        )


def _noise_levels(scheduler: Any, num_inference_steps: int | None, mu: float | None) -> tuple[Tensor, Tensor]:
    """The noise levels t before the steps, `[T]` float64, and the timesteps, float32. They are the scheduler's own, after its
    shift."""
    dynamic = scheduler.config.use_dynamic_shifting
    if num_inference_steps is not None:
        if dynamic and mu is None:
            raise ValueError(
                "mu = None: the scheduler has use_dynamic_shifting=True, so its noise levels depend on the image size. Pass "
                "mu=dynamic_shift(tokens, scheduler.config)."
            )
        if mu is not None and not dynamic:
            raise ValueError(f"mu = {mu}: has no effect, the scheduler has use_dynamic_shifting=False. Leave it out.")
        scheduler = copy.copy(scheduler)
        # From sigmas, because diffusers takes its own from sigma_min, which is already shifted (its issue 13243).
        levels = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=levels, mu=mu)
    elif mu is not None:
        raise ValueError(f"mu = {mu}: has no effect without num_inference_steps. Pass it to scheduler.set_timesteps.")
    elif getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("scheduler has no timesteps: call scheduler.set_timesteps or pass num_inference_steps=n")
    sigmas, timestep = scheduler.sigmas.double().cpu(), scheduler.timesteps.float().cpu()
    if abs(sigmas[0] - 1) < ROUNDING:
        sigmas = torch.cat([sigmas.new_ones(1), sigmas[1:]])
    _check_falling("sigmas", sigmas)
    _check_falling("timesteps", timestep)
    if sigmas[0] > 1 or sigmas[-1] != 0:
        row = 0 if sigmas[0] > 1 else len(sigmas) - 1
        raise ValueError(
            f"scheduler.sigmas[{row}] = {sigmas[row].item()}: noise levels must fall from at most 1 to 0. Pass other sigmas "
            "to scheduler.set_timesteps."
        )
    return sigmas[:-1], timestep


def _check_falling(name: str, values: Tensor) -> None:
    bad = ~(values[1:] < values[:-1])
    if bad.any():
        row = int(bad.nonzero()[0]) + 1
        raise ValueError(
            f"scheduler.{name}[{row}] = {values[row].item()}: must be below the one before, {values[row - 1].item()}, because "
            "every step removes noise. Pass other sigmas to scheduler.set_timesteps."
        )


def _ddim(t: Tensor, s: Tensor, eta: float) -> Coefficients:
    kept = (s * (1 - t) / (t * (1 - s))).square()  # of the noise: η = 1 gives r = s √kept, exactly 0 at t = 1
    variance = eta**2 * (1 - kept)
    return _affine_denoising(t, s, s * (1 - variance).sqrt(), s * variance.sqrt())


def _cps(t: Tensor, s: Tensor, eta: float) -> Coefficients:
    return _affine_denoising(t, s, s * math.cos(eta * math.pi / 2), s * math.sin(eta * math.pi / 2))


def _affine_denoising(t: Tensor, s: Tensor, r: Tensor, sigma: Tensor) -> Coefficients:
    """a, b and σ of ``(1 − s) x̂0 + r ε̂``."""
    a, b = (1 - s) + r, (1 - t) * r - t * (1 - s)
    return a, b, torch.where(s > 0, sigma, t.clamp(max=FINAL_SIGMA))


def _flow_sde(t: Tensor, s: Tensor, eta: float) -> Coefficients:
    # At t = 1, where the diffusion is infinite, Flow-GRPO replaces t in its denominator with the next level.
    return _euler_maruyama(t, s, eta**2 * t / (1 - torch.where(t == 1, s, t)))


def _dance(t: Tensor, s: Tensor, eta: float) -> Coefficients:
    return _euler_maruyama(t, s, torch.full_like(t, eta**2))


def _euler_maruyama(t: Tensor, s: Tensor, diffusion: Tensor) -> Coefficients:
    """a, b and σ of a step of the SDE with diffusion g, from g²."""
    step = t - s
    return 1 - diffusion * step / (2 * t), -step * (1 + diffusion * (1 - t) / (2 * t)), (diffusion * step).sqrt()


def _euler(t: Tensor, s: Tensor, eta: float) -> Coefficients:
    return torch.ones_like(t), s - t, torch.zeros_like(t)


ROWS: dict[FlowRows, Callable[[Tensor, Tensor, float], Coefficients]] = {
    "ddim": _ddim,
    "flow-sde": _flow_sde,
    "dance": _dance,
    "cps": _cps,
    "euler": _euler,
}
"""Name → a, b and σ of the steps from t to s, `[T]` each, from both and η."""
