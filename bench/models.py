"""The models that `bench.whole_step` times, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from fastnabla.models.architectures import MIDSIZE, SD15, SDXL_BASE
from fastnabla.rewards.clip import VIT_L_14
from fastnabla.testbed import pipeline_folder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of the networks, and defaults of the timed step."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    pixels: int
    reward_pixels: int = 224
    vision: dict[str, Any] = dataclasses.field(default_factory=VIT_L_14.vision_config.to_dict)
    """Configuration of the vision transformer reward."""
    decode_chunk: int | None = None
    """Number of images that the lean decoder decodes at once."""
    tokens: int = 77
    flow: tuple[int, ...] = (64, 128, 256, 256)
    transitions: int
    micro_batch: int


TOY = Model(
    unet={
        "block_out_channels": (16, 32),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    vae={
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    vision={
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 8,
    },
    **{"pixels": 16, "reward_pixels": 16, "tokens": 4, "flow": (16, 32), "transitions": 12, "micro_batch": 2},
)
SD15_SETTINGS = {"transitions": 48, "micro_batch": 16, "decode_chunk": 4}
"""The planner's choice for 40 GB and more; 8 trajectories."""
MODELS: dict[str, Callable[[], Model]] = {
    "toy": lambda: TOY,
    "testbed": lambda: Model(
        unet=dict(UNet2DConditionModel.load_config(pipeline_folder(), subfolder="unet")),
        vae=dict(AutoencoderKL.load_config(pipeline_folder(), subfolder="vae")),
        **{"pixels": 32, "reward_pixels": 32, "tokens": 16, "transitions": 320, "micro_batch": 64},
    ),
    "midsize": lambda: Model(unet=MIDSIZE.network, vae=MIDSIZE.vae, pixels=256, transitions=12, micro_batch=2),
    "sd15": lambda: Model(unet=SD15.network, vae=SD15.vae, pixels=512, **SD15_SETTINGS),
    "sdxl": lambda: Model(unet=SDXL_BASE.network, vae=SDXL_BASE.vae, pixels=1024, transitions=12, micro_batch=2),
}
