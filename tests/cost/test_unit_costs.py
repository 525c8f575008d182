"""Arithmetic and memory of Stable Diffusion 1.5's passes, from shapes."""

import functools

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fastnabla.config.model_sections import LORA_TARGETS
from fastnabla.config.train import TrainConfig
from fastnabla.cost import planner
from fastnabla.cost.planner import USABLE_FRACTION, plan_memory
from fastnabla.cost.shapes import Shapes, fake_weights
from fastnabla.cost.unit_costs import UnitCosts
from fastnabla.models.description import Description
from fastnabla.models.families import SD
from fastnabla.models.flow import build_flow
from fastnabla.models.lora import add_lora

pytestmark = pytest.mark.slow

SHALLOW = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 1280),
    "layers_per_block": 1,
}


@functools.cache
def stable_diffusion(rank: int = 8, guided: bool = True, shallow: bool = False) -> UnitCosts:
    """In bfloat16; with rank 0 for full finetuning. A quarter of its blocks, the `SHALLOW` ones, are counted four times as fast."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, **SHALLOW if shallow else {}
        )
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=1 if shallow else 2)
        flow = build_flow("conv" if shallow else "unet", 4, 768, seed=0)
    unet, vae = (network.bfloat16().requires_grad_(False) for network in (unet, vae))
    if rank:
        add_lora(unet, rank, LORA_TARGETS)
    else:
        unet.float().requires_grad_()
    description = Description(family=SD, network=unet.config, vae=vae.config, lengths=SD.text_lengths)
    return UnitCosts(Shapes(unet, vae, flow, torch.bfloat16, description, (4, 64, 64)), guided=guided)


def test_arithmetic() -> None:
    """A row of the UNet is 0.80 TFLOP as published (402 G multiply-adds), and a decode with its backward pass 5.06."""
    costs = stable_diffusion()
    assert costs.network_flops == pytest.approx(1.61e12, rel=0.03)
    guided, alone = (stable_diffusion(guided=each, shallow=True) for each in (True, False))
    assert guided.network_flops == pytest.approx(2 * alone.network_flops)
    assert costs.decode_flops == pytest.approx(5.0e12, rel=0.05)
    assert 0 < costs.flow_flops < 0.05 * costs.network_flops


def test_memory_of_a_pass() -> None:
    """1.65 GB kept by a transition, in proportion to their number."""
    costs, shallow = stable_diffusion(), stable_diffusion(shallow=True)
    whole, one, eight = costs.network_bytes(False), shallow.network_bytes(False), shallow.network_bytes(False, 8)
    assert whole.kept == pytest.approx(1.65e9, rel=0.03)
    assert whole.kept < whole.peak < 1.1 * whole.kept
    # Not 8: the LoRA's weights and gradients are there once.
    assert 7.9 < eight.peak / one.peak < 8
    assert costs.shapes.network.device.type == "meta"


def test_24_gigabytes_need_no_checkpointing() -> None:
    """All blocks of Stable Diffusion 1.5 are counted here."""
    costs = stable_diffusion()
    chosen = plan_memory(TrainConfig(vram=24), costs, int(24e9), torch.device("cpu"))
    assert not chosen.checkpoint_network and not chosen.checkpoint_decoder
    assert chosen.micro_batch >= 4
    larger = planner._step(costs, chosen.micro_batch + 1, chosen.decode_chunk, False, False)
    assert sum(chosen.fixed.values()) + max(larger.values()) > USABLE_FRACTION * 24e9, "one more would fit"


def test_recomputing_keeps_less() -> None:
    """A fifth, if all blocks are counted."""
    costs = stable_diffusion(shallow=True)
    kept, recomputed = costs.network_bytes(False), costs.network_bytes(True)
    assert recomputed.kept < 0.3 * kept.kept
    assert recomputed.peak < 0.7 * kept.peak
    assert not costs.shapes.network.is_gradient_checkpointing


def test_memory_of_full_finetuning() -> None:
    """More by float32 gradients and weights cast to bfloat16, however many transitions there are."""
    costs = stable_diffusion(rank=0, shallow=True)
    weights = sum(parameter.numel() for parameter in costs.shapes.network.parameters())
    extra = costs.network_bytes(False).kept - stable_diffusion(shallow=True).network_bytes(False).kept
    assert 1.9 * weights < extra < 2.6 * weights
    assert costs.network_bytes(False).peak > 4 * weights
    assert costs.network_bytes(False, 8).kept < 8 * costs.network_bytes(False).kept - 6 * 2 * weights


def test_pretended_weights_are_put_back() -> None:
    unet = stable_diffusion().shapes.network
    before = dict(unet.named_parameters())
    with pytest.raises(RuntimeError, match="within"), fake_weights(unet):
        assert unet.conv_in.weight.device.type == "cpu"
        assert {n: p.requires_grad for n, p in unet.named_parameters()} == {
            n: p.requires_grad for n, p in before.items()
        }
        raise RuntimeError("within")
    assert all(parameter is before[name] for name, parameter in unet.named_parameters())
