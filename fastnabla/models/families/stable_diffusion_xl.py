"""Stable Diffusion XL: two text encoders, a pooled embedding, and the image's size as a condition."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastnabla.models.families.family import Configuration
from fastnabla.models.families.parts import Parts
from fastnabla.models.families.unet import UNET, UNET_PIPELINE, UNetFamily, wrong_addition
from fastnabla.models.known_configuration import CLIP, DIFFUSION_SCHEDULER, VAE, Known, Only, any_value

XL_PIPELINE: Known = UNET_PIPELINE | {
    **any_value("force_zeros_for_empty_prompt text_encoder_2 tokenizer_2"),
    "add_watermarker": Only((False, None), "images get no watermark"),
}


class StableDiffusionXL(UNetFamily):
    """A UNet with two CLIP text encoders side by side."""

    pipeline = StableDiffusionXLPipeline
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    text_lengths: ClassVar = {"text_encoder": 77, "text_encoder_2": 77}
    known: ClassVar = {
        "model_index.json": XL_PIPELINE,
        "unet/config.json": UNET,
        "vae/config.json": VAE | any_value("latents_mean latents_std"),
        "text_encoder/config.json": CLIP,
        "text_encoder_2/config.json": CLIP,
        "scheduler/scheduler_config.json": DIFFUSION_SCHEDULER,
    }
    tiny_decoder = "madebyollin/taesdxl"
    vae_overflows = True

    def embedding_shapes(self, network: Configuration, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        pooled = network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"]
        return super().embedding_shapes(network, lengths) | {"pooled": (pooled,)}

    def size_input(self, size: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Original size, crop and target size `[6]` of an uncropped image."""
        return {"time_ids": torch.tensor((*size, 0, 0, *size), dtype=dtype)}

    def _added_conditions(self, parts: Parts) -> Iterator[str]:
        unet, second = parts.network, parts.text_encoders.get("text_encoder_2")
        if unet["addition_embed_type"] != "text_time":
            yield f"unet.addition_embed_type = {unet['addition_embed_type']!r}: {wrong_addition('text_time', 'XL')}"
        elif second is not None:
            width, pooled = unet["projection_class_embeddings_input_dim"], second.projection_dim
            each = unet["addition_time_embed_dim"] or 0
            if width == 5 * each + pooled:
                yield (
                    f"unet.projection_class_embeddings_input_dim = {width!r}: takes five size conditions, as Stable Diffusion "
                    "XL's refiner, which refines images; use the base model"
                )
            elif width != 6 * each + pooled:
                yield (
                    f"unet.projection_class_embeddings_input_dim = {width!r}: must be 6 · addition_time_embed_dim + "
                    f"text_encoder_2.projection_dim = 6 · {each} + {pooled} = {6 * each + pooled}; use the second text encoder "
                    "that the UNet was trained with"
                )
