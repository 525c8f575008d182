"""Reads what a pretrained model is from its configuration files, without loading its weights."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging

from fastnabla.config.model_sections import TESTBED, ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.testbed import pipeline_folder

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
FAMILIES: dict[str, type[Pipeline]] = {
    family.__name__: family for family in (StableDiffusionPipeline, StableDiffusionXLPipeline)
}


def source_of(model: ModelConfig) -> str | Path:
    """Folder or Hub id of `model`."""
    return pipeline_folder() if model.name == TESTBED else model.name


@contextlib.contextmanager
def loading(model: ModelConfig) -> Iterator[None]:
    """Within the context, an error in reading the files of `model` becomes a ValueError that names a remedy."""
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"model.name = {model.name!r}: cannot be loaded as a diffusers pipeline of Stable Diffusion "
            f"({' '.join(str(error).split())}). Give a local folder with a model_index.json, 'testbed', or a Hub id "
            f"downloaded with: hf download {model.name}"
        ) from error


def family_of(model: ModelConfig) -> type[Pipeline]:
    """The pipeline class of `model`.

    Raises:
        ValueError: the model is not found, or its pipeline is not supported.
    """
    with loading(model):
        name = DiffusionPipeline.load_config(source_of(model), revision=model.revision).get("_class_name")
        if name not in FAMILIES:
            raise ValueError(f"it is a {name}; supported are {', '.join(FAMILIES)}")
        return FAMILIES[name]


def configurations(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of the UNet and the VAE of `model`.

    Raises:
        ValueError: they cannot be read, or the pipeline is not supported.
    """
    if model.random_init:
        architecture = architecture_of(model.name)
        return architecture.unet, architecture.vae
    family_of(model)
    with loading(model):
        unet, vae = (
            part.load_config(source_of(model), subfolder=folder, revision=model.revision)
            for part, folder in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
        )
        return unet, vae


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
