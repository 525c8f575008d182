"""Loads a pipeline from one .safetensors file with all weights, in the layout of the original implementation."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import nn

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.model_config import Pipeline
from fastnabla.models.model_source import source_of
from fastnabla.models.noise_schedule import shipped_scheduler
from fastnabla.models.safetensors_header import SafetensorsHeader


def load_single_file(
    model: ModelConfig, file: Path, family: type[Pipeline], dtypes: dict[str, torch.dtype]
) -> Pipeline:
    """The pipeline in `file`, with the configuration of `model.config`, or of the model that the file is recognised as.

    Args:
        model: the configuration.
        file: of its weights.
        family: class of the pipeline.
        dtypes: of the weights, by part: "default" and "vae".

    Raises:
        ValueError: the file does not fit the configuration.
        OSError: the configuration cannot be read.
    """
    told, configured = _prediction_types(model, file)
    if told not in (None, configured):
        raise ValueError(
            f"the file says that it was trained for prediction_type = {told!r}, and its configuration has {configured!r}; give "
            f"--model.config: the folder of a pipeline whose scheduler has {told!r}"
        )
    shared = {"config": str(source_of(model)), "revision": model.revision}
    absent = {"feature_extractor": None, "image_encoder": None}
    if family is StableDiffusionPipeline:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", torch_dtype=dtypes["vae"], **shared)
        pipeline = family.from_single_file(str(file), vae=vae, torch_dtype=dtypes["default"], **shared, **absent)
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


def _prediction_types(model: ModelConfig, file: Path) -> tuple[str | None, str]:
    """What the network predicts according to the file, if it says so, and according to the configuration."""
    told = SafetensorsHeader.of(file, f"model.name = {model.name!r}").prediction_type()
    return told, shipped_scheduler(model).config.get("prediction_type", "epsilon")
