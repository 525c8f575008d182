"""Tiny pipelines of every family, with random weights."""

import dataclasses
from pathlib import Path

import torch

from fastnabla.models.architectures import SD15, SD21, SDXL_BASE, Architecture, Sizes
from fastnabla.models.random_init import random_pipeline

VAE = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def _tiny(full: Architecture, unet: Sizes, widths: tuple[int, ...]) -> Architecture:
    small = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": sum(widths)}
    texts = [
        sizes | {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "projection_dim": 12}
        | {"num_attention_heads": 2}
        for sizes, width in zip(full.text_encoders, widths, strict=True)
    ]  # fmt: skip
    vae = VAE | {name: size for name, size in full.vae.items() if name == "scaling_factor"}
    network = full.network | small | unet
    return dataclasses.replace(full, network=network, vae=vae, text_encoders=tuple(texts))


_TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}
TINY = {
    "sd15": _tiny(SD15, _TWO_LEVELS, (16,)),
    "sd21": _tiny(SD21, _TWO_LEVELS | {"attention_head_dim": (2, 4)}, (16,)),
    "sdxl": _tiny(
        SDXL_BASE,
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 12,
        },
        (16, 24),
    ),
}


def save_tiny(family: str, folder: Path) -> str:
    """Save a tiny pipeline of `family` below `folder`, and return its path."""
    random_pipeline(TINY[family], {"default": torch.float32}).save_pretrained(folder / family)
    return str(folder / family)
