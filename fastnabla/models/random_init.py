"""Stable Diffusion pipelines with random weights, for dry runs, smoke tests and benchmarks; nothing is downloaded."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastnabla.models.architectures import Architecture
from fastnabla.testbed import pipeline_folder


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the context, new weights have the type `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_pipeline(
    architecture: Architecture, dtypes: Mapping[str, torch.dtype]
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline of `architecture` with random weights (seed 0) and the testbed's tokenizer.

    Args:
        architecture: configurations of the components.
        dtypes: types of the weights, by component: "default", and optionally "vae".
    """
    tokenizer = CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer", model_max_length=77)
    texts = [CLIPTextConfig(**sizes) for sizes in architecture.text_encoders]
    with torch.random.fork_rng(devices=[]), default_dtype(dtypes["default"]):
        torch.manual_seed(0)
        with default_dtype(dtypes.get("vae", dtypes["default"])):
            vae = AutoencoderKL(**architecture.vae)
        parts = {
            "vae": vae,
            "text_encoder": CLIPTextModel(texts[0]),
            "tokenizer": tokenizer,
            "unet": UNet2DConditionModel(**architecture.unet),
            "scheduler": DDIMScheduler(**architecture.scheduler),
        }
        if len(texts) == 1:
            absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return StableDiffusionPipeline(**parts, **absent)
        second = {"text_encoder_2": CLIPTextModelWithProjection(texts[1]), "tokenizer_2": tokenizer}
        return StableDiffusionXLPipeline(**parts, **second)
