"""The sampler of a run: a diffusers scheduler for the pipeline, and its table.

Only the noise schedule is the checkpoint's. Everything else is the run's, so two checkpoints of one model are sampled alike,
whatever scheduler they were saved with.
"""

import logging
from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin

from fastnabla.config.model_sections import SamplerConfig
from fastnabla.models.noise_schedule import noise_schedule
from fastnabla.transition import TransitionTable

CLASSES: dict[str, type[DDIMScheduler] | type[DPMSolverMultistepScheduler]] = {
    "ddim": DDIMScheduler,
    "sde-dpmsolver++": DPMSolverMultistepScheduler,
}
FIXED: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False},
    "sde-dpmsolver++": {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 1,
        "final_sigmas_type": "sigma_min",
        "use_karras_sigmas": False,
        "thresholding": False,
    },
}
"""By `sampler.scheduler`: settings without which a step has no density, or no mean affine in the network's output."""
STEPS_OFFSET = 1
"""Stable Diffusion's. DDIM with "leading" spacing then ends at timestep 1, where a step has noise, instead of 0."""

logger = logging.getLogger("fastnabla")


def use_sampler(pipeline: DiffusionPipeline, config: SamplerConfig, tokens: int | None = None) -> TransitionTable:
    """Give `pipeline` the scheduler of `config`, with its own noise schedule, and return the table of the sampler.

    Raises:
        ValueError: the pipeline's scheduler does not describe a discrete variance-preserving diffusion, or a setting does
            not fit its noise schedule.
    """
    pipeline.scheduler = scheduler_of(pipeline.scheduler, config)
    _check_terminal_snr(pipeline.scheduler, config)
    try:
        table = TransitionTable.from_scheduler(pipeline.scheduler, config.steps, config.eta)
    except ValueError as error:
        raise ValueError(
            f"sampler.spacing = {config.spacing!r} with sampler.scheduler = {config.scheduler!r}, sampler.eta = {config.eta} "
            f"and sampler.steps = {config.steps}: {error}"
        ) from error
    try:
        return table if config.min_sigma is None else table.with_min_sigma(config.min_sigma)
    except ValueError as error:
        raise ValueError(f"sampler.{error}") from error


def scheduler_of(shipped: SchedulerMixin, config: SamplerConfig) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """The scheduler of `config` with the noise schedule of `shipped`, the scheduler that came with the checkpoint.

    Raises:
        ValueError: as `fastnabla.models.noise_schedule.noise_schedule`.
    """
    settings = {"timestep_spacing": config.spacing, "steps_offset": STEPS_OFFSET}
    if config.spacing is None:
        written = set(shipped.config) - set(shipped.config.get("_use_default_values", ()))
        settings = {name: shipped.config[name] for name in settings if name in written}
    return CLASSES[config.scheduler](**noise_schedule(shipped), **settings, **FIXED[config.scheduler])


def _check_terminal_snr(scheduler: DDIMScheduler | DPMSolverMultistepScheduler, config: SamplerConfig) -> None:
    """Zero terminal SNR needs a prediction of x̂0 or v where sampling starts from pure noise, and spacing that does so."""
    if not scheduler.config.rescale_betas_zero_snr:
        return
    if scheduler.config.timestep_spacing == "leading":
        logger.warning(
            "The checkpoint was trained with zero terminal SNR, and sampler.spacing = %r leaves out the timesteps of pure "
            "noise. Consider --sampler.spacing trailing.",
            config.spacing,
        )
    elif scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            f"sampler.spacing = {config.spacing!r}: starts at zero terminal SNR (the checkpoint has rescale_betas_zero_snr), "
            "where ε-prediction does not determine the clean sample. Use --sampler.spacing leading."
        )
