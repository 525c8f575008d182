"""Reads what a pretrained model is from its configuration files, without loading its weights."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from transformers import CLIPTextConfig

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.models.known_configuration import require_known
from fastnabla.models.model_source import remedy, source_of

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
FAMILIES: dict[str, type[Pipeline]] = {
    family.__name__: family for family in (StableDiffusionPipeline, StableDiffusionXLPipeline)
}


@contextlib.contextmanager
def loading(model: ModelConfig) -> Iterator[None]:
    """Within the context, an error in reading the files of `model` becomes a ValueError that names a remedy."""
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # the libraries raise their own types, and tokenizers a plain Exception
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise ValueError(
            f"model.name = {model.name!r}: cannot be loaded as a diffusers pipeline of Stable Diffusion "
            f"({' '.join(str(error).split())}). {remedy(model)}"
        ) from error


def family_of(model: ModelConfig) -> type[Pipeline]:
    """The pipeline class of `model`.

    Raises:
        ValueError: the model is not found, or its pipeline is not supported.
    """
    source = source_of(model)
    with loading(model):
        name = str(DiffusionPipeline.load_config(source, revision=model.revision).get("_class_name"))
    if name not in FAMILIES:
        raise ValueError(
            f"model.name = {model.name!r}: it is a {name}; supported are {', '.join(FAMILIES)}. If its UNet makes images from "
            "text alone, give a copy with one of these as _class_name in model_index.json. Otherwise use the text-to-image "
            "model that it was made from."
        )
    return FAMILIES[name]


def configurations(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of the UNet and the VAE of `model`.

    Raises:
        ValueError: they cannot be read, the pipeline is not supported, or a setting in one of its configuration files is not
            taken into account.
    """
    if model.random_init:
        architecture = architecture_of(model.name)
        return architecture.unet, architecture.vae
    is_xl = family_of(model) is StableDiffusionXLPipeline
    with loading(model):
        files = _configuration_files(model)
    require_known(model.name, is_xl, files)
    return files["unet/config.json"], files["vae/config.json"]


def _configuration_files(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """The contents of the configuration files of `model`, by their names. Of the files of absent parts, only those of the
    UNet and the VAE are read."""
    source, revision = source_of(model), model.revision
    index = DiffusionPipeline.load_config(source, revision=revision)
    files = {"model_index.json": index}
    for part, folder in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (DDIMScheduler, "scheduler")):
        if folder in ("unet", "vae") or _has(index, folder):
            file = f"{folder}/{part.config_name}"
            files[file] = part.load_config(source, subfolder=folder, revision=revision)
    for folder in ("text_encoder", "text_encoder_2"):
        if _has(index, folder):
            settings, _ = CLIPTextConfig.get_config_dict(source, subfolder=folder, revision=revision)
            # The configuration of a CLIP model with both encoders has the text encoder's inside.
            files[f"{folder}/config.json"] = settings.get("text_config") or settings
    return files


def _has(index: Mapping[str, Any], part: str) -> bool:
    return (index.get(part) or (None, None))[1] is not None


def is_xl(unet: Mapping[str, Any]) -> bool:
    """Whether a UNet's configuration has Stable Diffusion XL's pooled text and size conditions."""
    return unet.get("addition_embed_type") == "text_time"


def pooled_width(unet: Mapping[str, Any]) -> int:
    """Width of the pooled text embeddings of a Stable Diffusion XL UNet, which also takes six size conditions."""
    return unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]


def text_width(unet: Mapping[str, Any]) -> int | None:
    """Width of the text embeddings of a UNet; None if its layers differ in it."""
    widths = unet.get("encoder_hid_dim") or unet["cross_attention_dim"]
    if isinstance(widths, int):
        return widths
    return widths[0] if len(set(widths)) == 1 else None


def vae_dtype(model: ModelConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> torch.dtype:
    """The VAE's compute dtype: `model.vae_dtype`, or by default `model.dtype`.

    Instead of float16, the default is float32 for Stable Diffusion XL, whose VAE overflows in float16 unless its
    configuration has `force_upcast = False` (as in diffusers).
    """
    if model.vae_dtype is not None:
        return getattr(torch, model.vae_dtype)
    overflows = model.dtype == "float16" and is_xl(unet) and vae.get("force_upcast", True)
    return torch.float32 if overflows else getattr(torch, model.dtype)
