"""Checks of a run against its model, from the model's configuration files alone."""

from fastnabla.config.methods import METHODS
from fastnabla.config.train import TrainConfig
from fastnabla.methods.registry import require_flow_model
from fastnabla.models.fitting import checked_description
from fastnabla.models.image_size import latent_shape
from fastnabla.models.lora_targets import check_targets
from fastnabla.models.noise_schedule import shipped_scheduler
from fastnabla.models.sampler import sampler_of
from fastnabla.objective.noising import check_is_ddpm
from fastnabla.utils.require import require


def check_model(config: TrainConfig) -> None:
    """Check that the model can be finetuned as `config` says, before any weights are loaded.

    Raises:
        ValueError: the model is not supported, its parts do not fit each other, or its size, guidance, sampler or LoRA's layers
            are not for this model or method. The message names the field, its value and a remedy.
    """
    description, scale = checked_description(config.model), config.sampler.guidance_scale
    family, network = description.family, description.network
    problem = family.guidance_problem(network, scale)
    require(problem is None, "sampler.guidance_scale", scale, str(problem))
    check_targets(config.model, config.lora)

    tokens = family.tokens(network, *latent_shape(config.model, description)[1:])
    _, table = sampler_of(shipped_scheduler(config.model), config.sampler, tokens)
    require_flow_model(config, table)
    if METHODS[config.method].reverses_noising:
        check_is_ddpm(table, config.method)
