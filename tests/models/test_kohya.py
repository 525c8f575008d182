"""A LoRA under kohya's names: the names themselves, and the images when plain diffusers loads them."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from fastnabla import export
from fastnabla.config.model_sections import LORA_TARGETS
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import to_json
from fastnabla.models.conditions import Conditions
from fastnabla.models.kohya import save_kohya
from fastnabla.models.lora_targets import ALL_LINEAR
from fastnabla.models.policy import Policy
from fastnabla.models.random_init import random_pipeline
from fastnabla.models.saved_policy import save_policy
from tests.families import TINY

RANK = 3
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out")


def trained(family: str, targets: tuple[str, ...], weights: Path) -> tuple[StableDiffusionPipeline, Policy]:
    """A tiny pretrained pipeline, and a policy with a random LoRA, saved in `weights`."""
    torch.manual_seed(0)
    pipeline = random_pipeline(TINY[family], {"default": torch.float32})
    pipeline.set_progress_bar_config(disable=True)
    policy = Policy(copy.deepcopy(pipeline.unet), Conditions(torch.zeros(1, 1, 1)), None, RANK, targets)
    for parameter in policy.trained().values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_policy(policy, weights, torch.float32)
    return pipeline, policy


def images(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a fox", num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_plain_diffusers_samples_the_same_images(family: str, tmp_path: Path) -> None:
    """With a LoRA on every linear layer and on every convolution."""
    pipeline, policy = trained(family, (ALL_LINEAR, *CONVOLUTIONS, "proj_in", "proj_out"), tmp_path)
    save_kohya(tmp_path, tmp_path / "kohya.safetensors")
    pretrained = images(pipeline)
    pipeline.load_lora_weights(tmp_path / "kohya.safetensors")
    exported = images(pipeline)
    pipeline.unload_lora_weights()
    assert images(pipeline).equal(pretrained)
    pipeline.unet = policy.network
    own = images(pipeline)
    assert (own - pretrained).abs().max() > 0.01
    assert (exported - own).abs().max() < 1e-5


@pytest.mark.slow
def test_names_shapes_and_alpha(tmp_path: Path) -> None:
    """One layer of each kind, under the names that ComfyUI and AUTOMATIC1111's web UI look up."""
    _, policy = trained("sdxl", (ALL_LINEAR, *CONVOLUTIONS), tmp_path)
    save_kohya(tmp_path, tmp_path / "kohya.safetensors")
    tensors = load_file(tmp_path / "kohya.safetensors")
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    layers = {
        f"{block}_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        f"{block}_attn2_to_out_0": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        f"{block}_ff_net_0_proj": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        f"{block}_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
        "lora_unet_mid_block_resnets_0_time_emb_proj": "mid_block.resnets.0.time_emb_proj",
        "lora_unet_up_blocks_0_upsamplers_0_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_conv_in": "conv_in",
        "lora_unet_time_embedding_linear_1": "time_embedding.linear_1",
        "lora_unet_label_emb_0_0": "add_embedding.linear_1",
        "lora_unet_label_emb_0_2": "add_embedding.linear_2",
    }
    weights = policy.trained()
    for name, layer in layers.items():
        assert tensors[f"{name}.lora_down.weight"].equal(weights[f"{layer}.lora_A.policy.weight"]), name
        assert tensors[f"{name}.lora_up.weight"].equal(weights[f"{layer}.lora_B.policy.weight"]), name
    alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
    assert all(alpha.shape == () and alpha == RANK for alpha in alphas.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(weights) == 2 * len(alphas) and len(tensors) == 3 * len(alphas)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder "fox" with three LoRAs that differ."""
    preset = PRESETS["stable-diffusion"][1]
    config = dataclasses.replace(preset, optimizer=dataclasses.replace(preset.optimizer, ema=0.9))
    run = tmp_path / "fox"
    _, policy = trained("sd15", LORA_TARGETS, run)
    for name, factor in (("ema", 2.0), ("best", 1.5)):
        for parameter in policy.trained().values():
            parameter.data *= factor
        save_policy(policy, run / name, torch.float32)
    (run / "config.json").write_text(to_json(config))
    return run


def test_command_writes_the_weights_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run)]) == 0
    assert export.main([str(run), "--weights", "ema"]) == 0
    assert export.main([str(run), "--weights", "best", "--output", str(run / "new" / "b.safetensors")]) == 0
    assert f"wrote {run / 'fox-ema.safetensors'}" in capsys.readouterr().out.replace("\n", "")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
    raw, ema, best = (
        load_file(run / file)[name] for file in ("fox.safetensors", "fox-ema.safetensors", "new/b.safetensors")
    )
    assert torch.allclose(ema, 2 * raw) and torch.allclose(best, 3 * raw)


def test_without_a_lora_it_says_what_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "lora").rename(run / "unet")
    assert export.main([str(run)]) == 2
    assert "trained all parameters (lora.rank = 0). Use its unet/ as" in capsys.readouterr().err
    (run / "unet").rename(run / "transformer")
    assert export.main([str(run)]) == 2
    assert "Use its transformer/ as" in capsys.readouterr().err
    (run / "transformer").rename(run / "gone")
    assert export.main([str(run)]) == 2
    assert "has no trained weights yet" in capsys.readouterr().err
    (run / "ema" / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"cut")
    assert export.main([str(run), "--weights", "ema"]) == 2
    assert "of 3 bytes, is not a valid .safetensors file" in capsys.readouterr().err
