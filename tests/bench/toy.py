"""The smallest model that benchmarks are tested with."""

import dataclasses

from bench.models import TOY

ONE_LEVEL = dataclasses.replace(
    TOY,
    unet=TOY.unet
    | {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
    vae=TOY.vae
    | {
        "block_out_channels": (16,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    pixels=8,
)
