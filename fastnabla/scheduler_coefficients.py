"""The coefficients of `fastnabla.transition.TransitionTable`, derived from a diffusers scheduler.

Supported are the schedulers whose steps are Gaussian with a mean affine in the network's output: DDIM with noise, DDPM, and
first-order SDE-DPM-Solver++. `fastnabla.flow_matching_coefficients` has those of flow matching.
"""

from typing import Any

import torch
from torch import Tensor

_DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
_DDPM = ("DDPMScheduler", "DDPMParallelScheduler")
_DPM_SOLVER = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
_ALTERNATIVES = (
    "Use DDIMScheduler (any eta > 0), DDPMScheduler (variance_type='fixed_small'), or DPMSolverMultistepScheduler "
    "with algorithm_type='sde-dpmsolver++', solver_order=1, final_sigmas_type='sigma_min'; for flow matching "
    "FlowMatchEulerDiscreteScheduler."
)


def scheduler_coefficients(scheduler: Any, num_inference_steps: int | None, eta: float) -> dict[str, Tensor]:
    """The columns of a `TransitionTable` by name, `[T]` each; see `TransitionTable.from_scheduler`.

    Raises:
        ValueError: the scheduler or one of its settings is not supported, or eta is not positive and finite.
    """
    if not 0 < eta < float("inf"):
        raise ValueError(
            f"eta = {eta}: must be positive and finite. Without noise a step has no density, and ∇-DB needs one."
        )
    name = type(scheduler).__name__
    if name not in _DDIM + _DDPM + _DPM_SOLVER:
        raise ValueError(f"scheduler {name} is not supported. {_ALTERNATIVES}")
    _reject_settings(scheduler.config, name, eta)
    if num_inference_steps is not None:
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
    elif scheduler.num_inference_steps is None:
        raise ValueError("scheduler has no timesteps: call scheduler.set_timesteps(n) or pass num_inference_steps=n")
    build = _dpm_solver_columns if name in _DPM_SOLVER else _ddim_columns
    return build(scheduler, eta)


def _reject_settings(config: Any, name: str, eta: float) -> None:
    def reject(setting: str, why: str, instead: str) -> None:
        raise ValueError(f"scheduler setting {setting}={config[setting]!r} ({name}): {why}. Set {setting}={instead}.")

    if config.get("clip_sample"):
        reject("clip_sample", "clipping x̂0 makes the step's mean nonlinear in the network's output", "False")
    if config.get("thresholding"):
        reject("thresholding", "thresholding x̂0 makes the step's mean nonlinear in the network's output", "False")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        reject("prediction_type", "unknown parametrisation", "'epsilon', 'v_prediction' or 'sample'")
    if name not in _DDIM and eta != 1.0:
        raise ValueError(f"eta = {eta}: {name} has no eta. Use DDIMScheduler, or eta = 1.")
    if name in _DDPM and config.variance_type != "fixed_small":
        reject(
            "variance_type",
            "only the posterior variance of equation 7 of arXiv 2006.11239 is supported",
            "'fixed_small'",
        )
    if name in _DPM_SOLVER:
        if config.algorithm_type != "sde-dpmsolver++":
            reject(
                "algorithm_type",
                "the step has no noise, or its mean is not that of SDE-DPM-Solver++",
                "'sde-dpmsolver++'",
            )
        if config.solver_order != 1:
            reject("solver_order", "a higher-order step depends on earlier states", "1")
        if config.final_sigmas_type != "sigma_min":
            reject("final_sigmas_type", "the last step would have no density", "'sigma_min'")
        for setting in (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_lu_lambdas",
            "use_flow_sigmas",
        ):
            if config.get(setting):
                reject(setting, "the noise levels would not be those of integer timesteps", "False")


def _ddim_columns(scheduler: Any, eta: float) -> dict[str, Tensor]:
    """DDIM with noise (arXiv 2010.02502, equations 12 and 16); η = 1 is DDPM with its posterior variance.

    The last step ends at ᾱ_0 < 1 whatever `set_alpha_to_one` is: at ᾱ = 1 it would have σ = 0.
    """
    alphas = scheduler.alphas_cumprod.double().cpu()
    timestep = scheduler.timesteps.long().cpu()
    _check_trained(scheduler, timestep, alphas)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    timestep_next = (timestep - stride).clamp(min=0)
    if not torch.equal(timestep_next[:-1], timestep[1:]):
        raise ValueError(
            f"scheduler setting timestep_spacing={scheduler.config.timestep_spacing!r} with {len(timestep)} steps: the "
            f"timesteps are not {stride} apart, so a step does not end where the next begins. Set "
            "timestep_spacing='leading' (in a run: sampler.spacing), or a number of steps that divides num_train_timesteps."
        )
    now, then = alphas[timestep], alphas[timestep_next]
    variance = eta**2 * ((1 - then) / (1 - now) * (1 - now / then))
    sigma = variance.sqrt()
    c, d, e, f = _prediction(scheduler.config.prediction_type, now)
    direction = (1 - then - variance).sqrt()  # from the variance, not σ²: at ᾱ = 0 the difference is then exactly 0
    a, b = then.sqrt() * c + direction * e, then.sqrt() * d + direction * f
    return _columns(scheduler.config.prediction_type, timestep, timestep_next, a, b, sigma, alphas)


def _dpm_solver_columns(scheduler: Any, eta: float) -> dict[str, Tensor]:
    """First-order SDE-DPM-Solver++ (arXiv 2211.01095): with λ = log(α/σ) and h = λ' − λ,
    ``μ = (σ'/σ) e^{−h} x + α' (1 − e^{−2h}) x̂0`` and variance ``σ'² (1 − e^{−2h})``."""
    alphas = scheduler.alphas_cumprod.double().cpu()
    timestep = scheduler.timesteps.long().cpu()
    _check_trained(scheduler, timestep, alphas)
    timestep_next = torch.cat([timestep[1:], timestep.new_zeros(1)])
    now, then = alphas[timestep], alphas[timestep_next]
    log_snr, log_snr_next = (0.5 * torch.log(x / (1 - x)) for x in (now, then))
    h = log_snr_next - log_snr
    c, d, _, _ = _prediction(scheduler.config.prediction_type, now)
    pull = then.sqrt() * -torch.expm1(-2 * h)
    a = ((1 - then) / (1 - now)).sqrt() * torch.exp(-h) + pull * c
    sigma = ((1 - then) * -torch.expm1(-2 * h)).sqrt()
    return _columns(scheduler.config.prediction_type, timestep, timestep_next, a, pull * d, sigma, alphas)


def _check_trained(scheduler: Any, timestep: Tensor, alphas: Tensor) -> None:
    """Check that the network was trained at the first `timestep`."""
    if timestep.max() >= len(alphas):
        raise ValueError(
            f"scheduler setting steps_offset={scheduler.config.get('steps_offset')} with {len(timestep)} steps: the first "
            f"timestep, {timestep.max()}, is beyond the last trained one, {len(alphas) - 1}. Use fewer steps."
        )


def _prediction(kind: str, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of ``x̂0 = c x + d o`` and ``ε̂ = e x + f o`` at `alpha_bar`."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    if kind == "epsilon":
        return 1 / signal, -noise / signal, zero, one
    if kind == "v_prediction":
        return signal, -noise, noise, signal
    return zero, one, 1 / noise, -signal / noise


def _clean_prediction(kind: str, alpha_bar: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c and d; 1 and 0 at timestep 0, where the state is the finished sample."""
    c, d, _, _ = _prediction(kind, alpha_bar)
    finished = timestep == 0
    return torch.where(finished, 1.0, c), torch.where(finished, 0.0, d)


def _columns(
    kind: str, timestep: Tensor, timestep_next: Tensor, a: Tensor, b: Tensor, sigma: Tensor, alphas: Tensor
) -> dict[str, Tensor]:
    c, d = _clean_prediction(kind, alphas[timestep], timestep)
    c_next, d_next = _clean_prediction(kind, alphas[timestep_next], timestep_next)
    return {
        "timestep": timestep.float(),
        "timestep_next": timestep_next.float(),
        "a": a,
        "b": b,
        "sigma": sigma,
        "c": c,
        "d": d,
        "c_next": c_next,
        "d_next": d_next,
        "alpha_bar": alphas[timestep],
        "alpha_bar_next": alphas[timestep_next],
        "noise_std": (1 - alphas[timestep]).sqrt(),
        "noise_std_next": (1 - alphas[timestep_next]).sqrt(),
    }
