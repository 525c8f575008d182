"""Loads a pipeline from one .safetensors file with all weights, in the layout of the original implementation."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import nn

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.families import Family
from fastnabla.models.model_source import source_of
from fastnabla.models.noise_schedule import shipped_scheduler
from fastnabla.models.safetensors_header import SafetensorsHeader

DEFAULTS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
"""What a scheduler's configuration without these settings stands for."""


def load_single_file(
    model: ModelConfig,
    file: Path,
    family: Family,
    dtypes: Mapping[str, torch.dtype],
) -> DiffusionPipeline:
    """The pipeline in `file`, with the configuration of `model.config`, or of the model that the file is recognised as.

    Args:
        model: the configuration.
        file: of its weights.
        family: of the pipeline.
        dtypes: of the weights, by part: "default" and "vae".

    Raises:
        ValueError: the file does not fit the configuration.
        OSError: the configuration cannot be read.
    """
    _check_noise_schedule(model, file)
    shared = {"config": str(source_of(model)), "revision": model.revision}
    try:
        vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", torch_dtype=dtypes["vae"], **shared)
        pipeline = family.pipeline.from_single_file(
            str(file), vae=vae, torch_dtype=dtypes["default"], **shared, **family.absent
        )
    except (SingleFileComponentError, RuntimeError, ValueError, KeyError) as error:
        why = "it lacks weights of some layers" if "meta tensor" in str(error) else error
        raise ValueError(f"{file.name} does not fit the configuration {shared['config']!r}: {why}") from error
    # diffusers leaves parameters that the file lacks on the meta device.
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    missing = [f"{name}.{key}" for name, part in networks.items() for key, p in part.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(
            f"{file.name} does not fit the configuration {shared['config']!r}: it lacks {len(missing)} of its tensors, such as "
            f"{missing[0]}"
        )
    return pipeline


def _check_noise_schedule(model: ModelConfig, file: Path) -> None:
    """Check that the configuration has the noise schedule that the file says it was trained with, if it says so."""
    configured = DEFAULTS | dict(shipped_scheduler(model).config)
    for setting, value in SafetensorsHeader.of(file, f"model.name = {model.name!r}").noise_schedule().items():
        if configured[setting] != value:
            raise ValueError(
                f"the file says that it was trained for {setting} = {value!r}, and its configuration has "
                f"{configured[setting]!r}; give --model.config: the folder of a pipeline whose scheduler has {value!r}"
            )
