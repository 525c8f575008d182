"""Pipelines with random weights, for dry runs, smoke tests and benchmarks; nothing is downloaded."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTokenizer

from fastnabla.models.architectures import Architecture
from fastnabla.models.families import tokenizer_of
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


def random_pipeline(architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> DiffusionPipeline:
    """A pipeline of `architecture` with random weights (seed 0) and the testbed's tokenizer.

    Args:
        architecture: configurations of the components.
        dtypes: types of the weights, by component: "default", and optionally "vae".
    """
    family = architecture.family
    with torch.random.fork_rng(devices=[]), default_dtype(dtypes["default"]):
        torch.manual_seed(0)
        with default_dtype(dtypes.get("vae", dtypes["default"])):
            parts: dict[str, Any] = {"vae": AutoencoderKL(**architecture.vae)}
        for (name, encoder), sizes in zip(family.text_encoders.items(), architecture.text_encoders, strict=True):
            parts[name] = encoder(encoder.config_class(**sizes))
            parts[tokenizer_of(name)] = CLIPTokenizer.from_pretrained(
                pipeline_folder() / "tokenizer", model_max_length=family.text_lengths[name]
            )
        parts[family.network] = family.network_class(**architecture.network)
        return family.pipeline(**parts, scheduler=family.scheduler(**architecture.scheduler), **family.absent)
