"""Tiny pipelines of every family, with random weights."""

import dataclasses
from pathlib import Path

import torch

from fastnabla.config.model_sections import LoraConfig
from fastnabla.models.architectures import FLUX_DEV, SD3_MEDIUM, SD15, SD21, SD35_MEDIUM, SDXL_BASE, Architecture, Sizes
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


def _tiny_text(sizes: Sizes, width: int) -> Sizes:
    if "d_model" in sizes:
        return sizes | {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 1, "num_heads": 2}
    small = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | small | {"projection_dim": width}


def _tiny_flow(full: Architecture, transformer: Sizes, widths: tuple[int, ...]) -> Architecture:
    texts = [_tiny_text(sizes, width) for sizes, width in zip(full.text_encoders, widths, strict=True)]
    vae = full.vae | VAE | {"block_out_channels": (8, 16)}
    network = full.network | {"num_layers": 2, "joint_attention_dim": widths[-1]} | transformer
    return dataclasses.replace(full, network=network, vae=vae, text_encoders=tuple(texts))


_SD3 = {
    "sample_size": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 8 + 12,
    "pos_embed_max_size": 8,
}
FLOW_MODELS = {
    "sd3": _tiny_flow(SD3_MEDIUM, _SD3, (8, 12, 32)),
    "sd35": _tiny_flow(SD35_MEDIUM, _SD3 | {"dual_attention_layers": (0,)}, (8, 12, 32)),
    "flux": _tiny_flow(
        FLUX_DEV,
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        (16, 32),
    ),
}
UNETS = list(TINY)
TINY |= FLOW_MODELS

TRAINED = {
    "LoRA": LoraConfig(),
    "LoRA on all linear layers": LoraConfig(targets=("all-linear",)),
    "all weights": LoraConfig(rank=0),
}
"""What is trained, by how it is saved."""


_ONE_LEVEL = {
    "sd15": {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    },
    "sd3": {"num_layers": 1},
    "flux": {},
}


def one_level(family: str) -> Architecture:
    """The smallest pipeline of Stable Diffusion 1.5 ("sd15"), 3 ("sd3") or FLUX ("flux"): one block down and one up, or one layer,
    and a pixel for each latent."""
    full = TINY[family]
    vae = {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "mid_block_add_attention": False,
    }
    return dataclasses.replace(full, network=full.network | _ONE_LEVEL[family], vae=full.vae | vae)


def save_tiny(family: str, folder: Path) -> str:
    """Save a tiny pipeline of `family` below `folder`, and return its path."""
    random_pipeline(TINY[family], {"default": torch.float32}).save_pretrained(folder / family)
    return str(folder / family)
