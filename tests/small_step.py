"""The golden step with the smallest networks that have all that a step depends on: self- and cross-attention under a LoRA,
guidance, and a flow.

For tests that compare two ways of computing a step. Those against the reference's numbers need `tests.golden.load_step`.
"""

import dataclasses
import functools

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fastnabla.models.decoder import Decoder
from fastnabla.models.policy import Policy
from tests.golden import STEP_SETS, Flow, GoldenStep, load_step

WITH_FLOW = next(folder for folder in STEP_SETS if (folder / "flow").exists())
ONE_LEVEL = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}


def smallest_unet(attention: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **ONE_LEVEL,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D" if attention else "DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )


def small_step() -> GoldenStep:
    """A new one, with the same weights each time."""
    golden = load_step(WITH_FLOW)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(
            smallest_unet(attention=True),
            golden.policy.conditions,
            golden.policy.guidance_scale,
            rank=golden.meta["lora"]["r"],
            targets=tuple(golden.meta["lora"]["target_modules"]),
        )
        for parameter in policy.trainable():
            torch.nn.init.normal_(parameter, std=0.3)  # a new LoRA changes nothing
        vae = AutoencoderKL(
            **ONE_LEVEL,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            mid_block_add_attention=False,
        )
        flow = Flow(smallest_unet(attention=False))
    return dataclasses.replace(golden, policy=policy, flow=flow, decoder=Decoder(vae))


shared_step = functools.cache(small_step)
"""One for all tests of a process, which must not change it."""
