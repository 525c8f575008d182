"""diffusers pipelines: loading, prompt embeddings, sizes."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.models.conditions import Conditions
from fastnabla.models.fitting import checked_configurations
from fastnabla.models.image_size import image_size
from fastnabla.models.model_config import Pipeline, family_of, loading, vae_dtype
from fastnabla.models.model_source import single_file_of, source_of
from fastnabla.models.prompt_cache import CAPACITY, PromptCache
from fastnabla.models.random_init import random_pipeline
from fastnabla.models.single_file import load_single_file
from fastnabla.models.weight_files import require_whole, variant_to_load


def pipeline_of(config: ModelConfig) -> Pipeline:
    """The pipeline that `config` names, frozen: from a folder, the Hub, the package ("testbed"), or with random weights.

    Raises:
        ValueError: it is not found, cannot be loaded, is not of a supported family, or its parts do not fit each other.
    """
    dtypes = {"default": getattr(torch, config.dtype), "vae": vae_dtype(config, *checked_configurations(config))}
    pipeline = random_pipeline(architecture_of(config.name), dtypes) if config.random_init else _load(config, dtypes)
    for part in networks_of(pipeline).values():
        part.requires_grad_(False).eval()
    for tokenizer, encoder in zip(tokenizers(pipeline), text_encoders(pipeline), strict=True):
        # A tokenizer whose configuration has no limit would pad prompts to 10³⁰ tokens.
        tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(config: ModelConfig, dtypes: dict[str, torch.dtype]) -> Pipeline:
    family = family_of(config)
    # Parts that text-to-image does not need. Their classes may be gone from the library, as CLIPFeatureExtractor is.
    absent = {"feature_extractor": None, "image_encoder": None}
    if family is StableDiffusionPipeline:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    file = single_file_of(config)
    variant = variant_to_load(config) if file is None else None
    with loading(config):
        if file is not None:
            return load_single_file(config, file, family, dtypes, absent)
        pipeline = family.from_pretrained(
            source_of(config), revision=config.revision, variant=variant, dtype=dtypes, **absent
        )
    require_whole(config, networks_of(pipeline), variant)
    return pipeline


def networks_of(pipeline: Pipeline) -> dict[str, nn.Module]:
    """The pipeline's networks, by part."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def text_encoders(pipeline: Pipeline) -> list[nn.Module]:
    """The pipeline's one or two text encoders."""
    return [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]


def tokenizers(pipeline: Pipeline) -> list[PreTrainedTokenizerBase]:
    """The pipeline's one or two tokenizers."""
    return [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]


@torch.no_grad()
def encode_prompts(
    pipeline: Pipeline, prompts: Sequence[str], most: int | None = None, size: tuple[int, int] | None = None
) -> Conditions:
    """The UNet's conditions for `prompts`, as the pipeline itself encodes them. Stable Diffusion XL's size conditions are
    those of an uncropped image of `size`.

    More than `most` prompts are encoded lazily, one at a time, on the device where the text encoders are now, even if they
    are moved later. The choice depends only on the list of prompts, not on which of them a run draws, so that an extended
    run continues with the same numbers.

    Args:
        pipeline: its text encoders are on the device to encode on.
        prompts: texts, by index.
        most: up to this many prompts are encoded up front, in batches of 64; of a longer list, this many are cached. None
            for `CAPACITY`.
        size: (H, W) of the images, in pixels; None for the UNet's own.
    """
    most = CAPACITY if most is None else most
    device = pipeline.text_encoder.device

    def encode(texts: list[str], guided: bool) -> tuple[Tensor | None, ...]:
        return pipeline.encode_prompt(texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided)

    def encode_each(texts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        encoders = {encoder: encoder.device for encoder in text_encoders(pipeline)}
        for encoder in encoders:
            encoder.to(device)
        embeddings = [encode([text], guided=False)[::2] for text in texts]
        for encoder, previous in encoders.items():
            encoder.to(previous)
        return embeddings

    # encode_prompt returns (text, unconditional text) or (text, unconditional text, pooled, unconditional pooled).
    unconditional = encode([""], guided=True)[1::2]
    time_ids = None
    if len(unconditional) > 1:
        size = size or image_size(ModelConfig(), pipeline.unet.config, pipeline.vae.config)
        time_ids = torch.tensor((*size, 0, 0, *size), dtype=unconditional[0].dtype, device=device)
    if len(prompts) > most:
        return PromptCache(prompts, encode_each, unconditional, time_ids, most)
    parts = [encode(list(prompts[start : start + 64]), guided=False)[::2] for start in range(0, len(prompts), 64)]
    text, *pooled = (torch.cat(column) for column in zip(unconditional, *parts, strict=True))
    return Conditions(text, *(pooled or [None]), time_ids)
