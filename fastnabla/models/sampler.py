"""The sampler of a run: a diffusers scheduler for the pipeline, and its table."""

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastnabla.config.model_sections import SamplerConfig
from fastnabla.models.model_config import Pipeline
from fastnabla.transition import TransitionTable


def use_sampler(pipeline: Pipeline, config: SamplerConfig) -> TransitionTable:
    """Give `pipeline` the scheduler of `config`, with its own noise schedule, and return the table of the sampler.

    Raises:
        ValueError: the pipeline's scheduler does not describe a discrete variance-preserving diffusion, or a setting does
            not fit its noise schedule.
    """
    pipeline.scheduler = _scheduler(pipeline, config)
    try:
        table = TransitionTable.from_scheduler(pipeline.scheduler, config.steps, config.eta)
    except ValueError as error:
        if config.spacing is None:
            raise
        raise ValueError(
            f"sampler.spacing = {config.spacing!r} with sampler.scheduler = {config.scheduler!r} and sampler.steps = "
            f"{config.steps}: {error}"
        ) from error
    try:
        return table if config.min_sigma is None else table.with_min_sigma(config.min_sigma)
    except ValueError as error:
        raise ValueError(f"sampler.{error}") from error


def _scheduler(pipeline: Pipeline, config: SamplerConfig) -> DDIMScheduler | DPMSolverMultistepScheduler:
    own = pipeline.scheduler.config
    if "beta_schedule" not in own or "prediction_type" not in own:
        raise ValueError(
            f"the model's scheduler, {type(pipeline.scheduler).__name__}, is not supported: a DDIM or SDE-DPM-Solver++ "
            "sampler needs its beta_schedule and prediction_type."
        )
    spacing = {} if config.spacing is None else {"timestep_spacing": config.spacing}
    if config.scheduler == "ddim":
        absent = {"clip_sample": False, "set_alpha_to_one": False}
        changes = {name: value for name, value in absent.items() if name not in own}
        return DDIMScheduler.from_config(own, **changes, **spacing)
    return DPMSolverMultistepScheduler.from_config(
        own, algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min", **spacing
    )


class NoiseFloor:
    """`callback_on_step_end` of a diffusers pipeline that raises the noise of its steps to that of `table`.

    The pipeline's scheduler takes a step with its own σ. The callback adds independent noise of variance σ_table² − σ².

    Args:
        pipeline: its scheduler is that of `table`, without a lower bound of σ.
        table: the sampler, from `use_sampler`.
        config: the settings of `table`.
        generators: one per sample, those given to the pipeline. They are used only where noise is added.
    """

    def __init__(
        self, pipeline: Pipeline, table: TransitionTable, config: SamplerConfig, generators: list[torch.Generator]
    ) -> None:
        own = TransitionTable.from_scheduler(pipeline.scheduler, config.steps, config.eta)
        self.added = (table.sigma**2 - own.sigma**2).sqrt().tolist()
        self.generators = generators

    def __call__(
        self, pipeline: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state after the step, `tensors["latents"]`, with the noise added."""
        latents = tensors["latents"]
        if self.added[step] > 0:
            noise = randn_tensor(latents.shape, self.generators, latents.device, latents.dtype)
            latents = latents + self.added[step] * noise
        return {"latents": latents}
