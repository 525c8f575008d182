"""The sampler of a run: a diffusers scheduler for the pipeline, and its table.

Only the noise schedule is the checkpoint's. Everything else is the run's, so two checkpoints of one model are sampled alike,
whatever scheduler they were saved with. For a flow model, that is a linear time before the checkpoint's shift.
"""

import logging
from typing import Any

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from fastnabla.config.model_sections import SamplerConfig
from fastnabla.flow_matching_coefficients import dynamic_shift
from fastnabla.models.noise_schedule import is_flow_matching, schedule_of
from fastnabla.transition import TransitionTable
from fastnabla.utils.require import require

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
FLOW_ROWS = ("ddim", "flow-sde", "dance", "cps", "euler")
"""Values of `sampler.scheduler` for flow models."""
MEMORY = 0.05
"""Correlation of the finished sample with the first noise above which a flow model's sampler is warned of. (Stable Diffusion
1.5's schedule does not reach pure noise: it has 0.08 with 50 steps of DDPM.)"""
STEPS_OFFSET = 1
"""Stable Diffusion's. DDIM with "leading" spacing then ends at timestep 1, where a step has noise, instead of 0."""

logger = logging.getLogger("fastnabla")


def use_sampler(pipeline: DiffusionPipeline, config: SamplerConfig, tokens: int | None = None) -> TransitionTable:
    """Give `pipeline` the scheduler of `config`, with its own noise schedule, and return the table of the sampler.

    Args:
        pipeline: its scheduler is replaced.
        config: the run's.
        tokens: number of tokens of an image, on which the noise levels of some flow models depend.

    Raises:
        ValueError: the pipeline's scheduler does not describe a discrete variance-preserving diffusion or flow matching, or a
            setting does not fit its noise schedule.
    """
    pipeline.scheduler, table = sampler_of(pipeline.scheduler, config, tokens)
    _warn(pipeline.scheduler, table, config)
    return table


def sampler_of(
    shipped: SchedulerMixin, config: SamplerConfig, tokens: int | None = None
) -> tuple[SchedulerMixin, TransitionTable]:
    """The scheduler of `config` and its table.

    Args:
        shipped: the scheduler that came with the checkpoint.
        config, tokens: as for `use_sampler`.

    Raises:
        ValueError: as `use_sampler`.
    """
    scheduler = scheduler_of(shipped, config)
    try:
        if is_flow_matching(scheduler):
            mu = dynamic_shift(tokens, scheduler.config) if scheduler.config.use_dynamic_shifting else None
            table = TransitionTable.from_scheduler(scheduler, config.steps, config.eta, rows=config.scheduler, mu=mu)
        else:
            _check_terminal_snr(scheduler, config)
            table = TransitionTable.from_scheduler(scheduler, config.steps, config.eta)
    except ValueError as error:
        raise ValueError(
            f"sampler.spacing = {config.spacing!r} with sampler.scheduler = {config.scheduler!r}, sampler.eta = {config.eta} "
            f"and sampler.steps = {config.steps}: {error}"
        ) from error
    try:
        return scheduler, table if config.min_sigma is None else table.with_min_sigma(config.min_sigma)
    except ValueError as error:
        raise ValueError(f"sampler.{error}") from error


def scheduler_of(
    shipped: SchedulerMixin, config: SamplerConfig
) -> DDIMScheduler | DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler of `config` with the noise schedule of `shipped`, the scheduler that came with the checkpoint.

    Raises:
        ValueError: as `fastnabla.models.noise_schedule.noise_schedule`, or a setting is not for this kind of model.
    """
    flow = is_flow_matching(shipped)
    schedule = schedule_of(shipped)
    kind, kinds = ("flow", FLOW_ROWS) if flow else ("diffusion", tuple(CLASSES))
    require(
        config.scheduler in kinds,
        "sampler.scheduler",
        config.scheduler,
        f"the model is a {kind} model; use {', '.join(kinds)}.",
    )
    if flow:
        default = SamplerConfig().spacing
        require(
            config.spacing == default,
            "sampler.spacing",
            config.spacing,
            f"is for diffusion models, and this is a flow model, whose times are linear; leave it at {default!r}.",
        )
        return FlowMatchEulerDiscreteScheduler(**schedule)
    settings = {"timestep_spacing": config.spacing, "steps_offset": STEPS_OFFSET}
    if config.spacing is None:
        written = set(shipped.config) - set(shipped.config.get("_use_default_values", ()))
        settings = {name: shipped.config[name] for name in settings if name in written}
    return CLASSES[config.scheduler](**schedule, **settings, **FIXED[config.scheduler])


def _check_terminal_snr(scheduler: DDIMScheduler | DPMSolverMultistepScheduler, config: SamplerConfig) -> None:
    """Zero terminal SNR needs a prediction of x̂0 or v where sampling starts from pure noise."""
    own = scheduler.config
    if own.rescale_betas_zero_snr and own.timestep_spacing != "leading" and own.prediction_type == "epsilon":
        raise ValueError(
            f"sampler.spacing = {config.spacing!r}: starts at zero terminal SNR (the checkpoint has rescale_betas_zero_snr), "
            "where ε-prediction does not determine the clean sample. Use --sampler.spacing leading."
        )


def _warn(scheduler: SchedulerMixin, table: TransitionTable, config: SamplerConfig) -> None:
    """Warn of a sampler that does not start from pure noise though the network knows it, or that remembers its noise."""
    if not is_flow_matching(scheduler):
        if scheduler.config.rescale_betas_zero_snr and scheduler.config.timestep_spacing == "leading":
            logger.warning(
                "The checkpoint was trained with zero terminal SNR, and sampler.spacing = %r leaves out the timesteps of pure "
                "noise. Consider --sampler.spacing trailing.",
                config.spacing,
            )
    elif not table.is_deterministic and abs(memory := table.memory()) > MEMORY:
        logger.warning(
            "sampler.scheduler = %r with sampler.eta = %g: finished samples have a correlation of %.2f with the first noise (on "
            "Gaussian data), so a run does not end at the pretrained model tilted by the reward. Use --sampler.scheduler ddim "
            "--sampler.eta 1.",
            config.scheduler,
            config.eta,
            memory,
        )
