"""The noise schedule of a checkpoint: what its weights were trained with.

It is a part of the scheduler that the checkpoint was saved with. The other settings of that scheduler say how somebody
sampled, and are not used (`fastnabla.models.sampler`).
"""

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.models.description import loading, pipeline_index
from fastnabla.models.model_source import source_of

ENTRIES = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
FLOW_ENTRIES = (
    *("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len"),
    *("max_image_seq_len", "time_shift_type"),
)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def shipped_scheduler(model: ModelConfig) -> SchedulerMixin:
    """The scheduler that came with the checkpoint `model`, from its configuration files.

    Raises:
        ValueError: they cannot be read, or `noise_schedule` refuses the scheduler. The message names the model.
    """
    if model.random_init:
        architecture = architecture_of(model.name)
        return architecture.family.scheduler(**architecture.scheduler)
    source = source_of(model)
    with loading(model):
        _, name = pipeline_index(model)["scheduler"]
        scheduler = getattr(diffusers, name).from_pretrained(source, subfolder="scheduler", revision=model.revision)
    try:
        schedule_of(scheduler)
    except ValueError as error:
        raise ValueError(f"model.name = {model.name!r}: {error}") from error
    return scheduler


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler` is that of a flow model."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def schedule_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """`flow_schedule` of a flow model's `scheduler`, or `noise_schedule` of any other."""
    return flow_schedule(scheduler) if is_flow_matching(scheduler) else noise_schedule(scheduler)


def flow_schedule(scheduler: FlowMatchEulerDiscreteScheduler) -> dict[str, Any]:
    """The arguments of a flow model's `scheduler` that define its noise levels, by diffusers' names."""
    return {name: scheduler.config[name] for name in FLOW_ENTRIES}


def noise_schedule(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The arguments of `scheduler` that define its noise schedule and the network's output, by diffusers' names.

    Args:
        scheduler: of any class, as loaded with a checkpoint.

    Raises:
        ValueError: it is not a discrete variance-preserving diffusion, or a DDIM scheduler cannot have its noise schedule.
    """
    own = scheduler.config
    missing = [name for name in ENTRIES if name not in own]
    if missing:
        raise _refusal(
            scheduler,
            f"it has no {', '.join(missing)}, so it is not a variance-preserving diffusion with discrete timesteps. Models "
            "of EDM cannot be finetuned; of a flow model, give a copy with FlowMatchEulerDiscreteScheduler, its shift and its "
            "num_train_timesteps in model_index.json and scheduler/scheduler_config.json",
        )
    schedule = {name: own[name] for name in ENTRIES} | {
        "rescale_betas_zero_snr": own.get("rescale_betas_zero_snr", False)
    }
    if schedule["prediction_type"] == "original_sample":  # an older name
        schedule["prediction_type"] = "sample"
    if own.get("use_flow_sigmas") or schedule["prediction_type"] == "flow_prediction":
        raise _refusal(scheduler, "it is one of flow matching (use_flow_sigmas or prediction_type = 'flow_prediction')")
    if own.get("timestep_type", "discrete") != "discrete":
        raise _refusal(
            scheduler, f"timestep_type = {own.timestep_type!r} gives the network log σ instead of a timestep"
        )
    if schedule["prediction_type"] not in PREDICTION_TYPES:
        raise _refusal(
            scheduler, f"prediction_type = {schedule['prediction_type']!r} must be one of {', '.join(PREDICTION_TYPES)}"
        )
    betas, timesteps = schedule["trained_betas"], schedule["num_train_timesteps"]
    if betas is None and schedule["beta_schedule"] not in BETA_SCHEDULES:
        raise _refusal(
            scheduler, f"beta_schedule = {schedule['beta_schedule']!r} must be one of {', '.join(BETA_SCHEDULES)}"
        )
    if betas is not None and len(betas) != timesteps:
        raise _refusal(scheduler, f"it has {len(betas)} trained_betas for num_train_timesteps = {timesteps}")
    _check_alphas(scheduler, schedule)
    return schedule


def _check_alphas(scheduler: SchedulerMixin, schedule: dict[str, Any]) -> None:
    """Check that `schedule` reproduces ᾱ of the `scheduler`, which a setting that it lacks may have changed."""
    ours = DDIMScheduler(**schedule).alphas_cumprod
    theirs = getattr(scheduler, "alphas_cumprod", None)
    # With zero terminal SNR some schedulers replace the last ᾱ, which is 0, with 2⁻²⁴.
    if theirs is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours), rtol=1e-4, atol=1e-7):
        raise _refusal(scheduler, "its ᾱ are not those of its betas")


def _refusal(scheduler: SchedulerMixin, why: str) -> ValueError:
    return ValueError(
        f"the checkpoint's scheduler, {type(scheduler).__name__}, is not supported: {why}. The noise schedule must be one that "
        "DDIMScheduler can have."
    )
