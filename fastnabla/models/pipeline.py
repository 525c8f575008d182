"""diffusers pipelines: loading, prompt embeddings."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastnabla.config.model_sections import ModelConfig
from fastnabla.distributed.beacon import BEACON
from fastnabla.models.architectures import architecture_of
from fastnabla.models.cached_conditions import DEVICE_BYTES, CachedConditions
from fastnabla.models.conditions import Conditions
from fastnabla.models.description import Description, family_of, loading
from fastnabla.models.encoded_prompts import HOST_BYTES, EncodedPrompts
from fastnabla.models.families import FAMILIES, Family, tokenizer_of
from fastnabla.models.fitting import checked_description
from fastnabla.models.image_size import image_size
from fastnabla.models.model_source import single_file_of, source_of
from fastnabla.models.quantised_linear import quantise_linear_layers, weight_bytes
from fastnabla.models.random_init import random_pipeline
from fastnabla.models.single_file import load_single_file
from fastnabla.models.weight_files import require_whole, variant_to_load


def pipeline_of(config: ModelConfig) -> DiffusionPipeline:
    """The pipeline that `config` names, frozen: from a folder, the Hub, the package ("testbed", "testbed-flow"), or with random weights.

    The finetuned network and the text encoders are quantised as `config.quantise` says.

    Raises:
        ValueError: it is not found, cannot be loaded, is not of a supported family, or its parts do not fit each other; the
            installed diffusers ignores `config.dtype`; or it cannot be quantised.
    """
    dtypes = {"default": getattr(torch, config.dtype), "vae": checked_description(config).vae_dtype(config)}
    pipeline = random_pipeline(architecture_of(config.name), dtypes) if config.random_init else _load(config, dtypes)
    for part in networks_of(pipeline).values():
        part.requires_grad_(False).eval()
    if config.quantise != "none":
        for network in (network_of(pipeline), *text_encoders(pipeline)):
            quantise_linear_layers(network, config.quantise)
    family_of_pipeline(pipeline).limit_tokenizers(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cast_for_decoder(pipeline: DiffusionPipeline) -> None:
    """Cast latents to the VAE's dtype before they are decoded, as in training. diffusers' pipelines do not, but in special cases."""
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **options: decode(latents.to(pipeline.vae.dtype), **options)


def _load(config: ModelConfig, dtypes: dict[str, torch.dtype]) -> DiffusionPipeline:
    family = family_of(config)
    if (file := single_file_of(config)) is not None:
        with loading(config):
            return load_single_file(config, file, family, dtypes)
    folder, variant = source_of(config), variant_to_load(config)
    if not Path(folder).is_dir():  # download, to check the files before they are loaded
        with loading(config):
            folder = family.pipeline.download(
                folder, revision=config.revision, variant=variant, use_safetensors=True, **family.absent
            )
        variant = variant_to_load(dataclasses.replace(config, variant=variant))
    with loading(config):
        pipeline = family.pipeline.from_pretrained(
            folder, variant=variant, dtype=dtypes, use_safetensors=True, **family.absent
        )
    require_whole(config, networks_of(pipeline), variant)
    _require_dtype(config, network_of(pipeline))
    return pipeline


def _require_dtype(config: ModelConfig, network: nn.Module) -> None:
    """Check that diffusers has not ignored the dtype, as older ones do.

    Small layers may be kept in float32, so the largest weight decides.

    Raises:
        ValueError: it has.
    """
    largest = max((weight for weight in network.parameters() if weight.is_floating_point()), key=Tensor.numel)
    if largest.dtype != getattr(torch, config.dtype):
        raise ValueError(
            f"model.dtype = {config.dtype!r}: diffusers {diffusers.__version__} loaded the weights in {largest.dtype}. Install a "
            "newer one; 0.42 is tried."
        )


def family_of_pipeline(pipeline: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline."""
    return FAMILIES[type(pipeline).__name__]


def network_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The network that is finetuned."""
    return getattr(pipeline, family_of_pipeline(pipeline).network)


def description_of(pipeline: DiffusionPipeline) -> Description:
    """The description of a loaded pipeline."""
    family = family_of_pipeline(pipeline)
    lengths = {name: getattr(pipeline, tokenizer_of(name)).model_max_length for name in family.text_encoders}
    return Description(family=family, network=network_of(pipeline).config, vae=pipeline.vae.config, lengths=lengths)


def networks_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's networks, by part."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def text_encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The pipeline's text encoders."""
    return [getattr(pipeline, name) for name in family_of_pipeline(pipeline).text_encoders]


def reading_tokenizers(pipeline: DiffusionPipeline) -> list[PreTrainedTokenizerBase]:
    """The tokenizers of the text encoders that read most of a prompt."""
    return [getattr(pipeline, tokenizer_of(name)) for name in family_of_pipeline(pipeline).readers]


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], size: tuple[int, int] | None = None
) -> Conditions:
    """The network's conditions for `prompts`, as the pipeline itself encodes them. Stable Diffusion XL's size conditions are
    those of an uncropped image of `size`.

    Up to `DEVICE_BYTES` of embeddings are all computed now, in batches of 64, and stay on the device. So are those that take no
    more than the text encoders and `HOST_BYTES`, so that large encoders need not come back for a few prompts; but they are in
    host memory, and the device holds those used last. Of a longer list each prompt is encoded by itself on first use, on the
    device where the text encoders are now, even if they are moved later. The choice depends only on the model and the list of
    prompts, not on which of them a run draws, so that an extended run continues with the same numbers.

    Args:
        pipeline: its text encoders are on the device to encode on.
        prompts: texts, by index.
        size: (H, W) of the images, in pixels; None for the network's own.
    """
    device, family = pipeline.text_encoder.device, family_of_pipeline(pipeline)

    def encode(text: str) -> tuple[Tensor, ...]:
        BEACON.advance()
        return tuple(column[0].cpu() for column in family.encode(pipeline, [text]))

    def encode_each(texts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        encoders = {encoder: encoder.device for encoder in text_encoders(pipeline)}
        try:
            for encoder in encoders:
                encoder.to(device)
            return [encode(text) for text in texts]
        finally:
            for encoder, previous in encoders.items():
                encoder.to(previous)

    unconditional = family.encode_nothing(pipeline)
    size = size or image_size(ModelConfig(), description_of(pipeline))
    shared = {name: value.to(device) for name, value in family.size_input(size, unconditional[0].dtype).items()}
    each = sum(table.nbytes for table in unconditional)
    needed, on_device = len(prompts) * each, (1 + len(prompts)) * each <= DEVICE_BYTES
    weights = sum(map(weight_bytes, text_encoders(pipeline)))
    if not on_device and needed > min(HOST_BYTES, weights):
        encoded = EncodedPrompts(prompts, encode_each, each, HOST_BYTES)
        return CachedConditions(len(prompts), encoded, unconditional, shared, DEVICE_BYTES)
    parts = (family.encode(pipeline, prompts[start : start + 64]) for start in range(0, len(prompts), 64))
    if on_device:
        text, *pooled = (torch.cat(column) for column in zip(unconditional, *parts, strict=True))
        return Conditions(text, *(pooled or [None]), shared)
    rows = [row for part in parts for row in zip(*(column.cpu() for column in part), strict=True)]
    return CachedConditions(
        len(prompts), lambda numbers: [rows[i] for i in numbers], unconditional, shared, DEVICE_BYTES
    )
