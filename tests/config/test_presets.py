"""Every preset can be planned and costed; one runs in the real shapes, with few channels."""

import re
from pathlib import Path

import pytest
import torch

from fastnabla import train
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import from_json, to_json
from fastnabla.cost import update_cost as update_cost_module
from fastnabla.cost.planner import unit_costs
from fastnabla.cost.update_cost import update_cost, update_trajectories
from fastnabla.models.architectures import ARCHITECTURES, SD15, SDXL_BASE
from fastnabla.prompts import PROMPT_SETS, prompts_of
from fastnabla.rewards import parse_term, published_class
from tests.checks import NETWORK_DTYPE
from tests.runs import smallest

REAL = [name for name in PRESETS if not name.startswith("testbed") and name != "stable-diffusion"]
DOCUMENTS = [Path(__file__).parents[2] / "docs" / f"{page}.md" for page in ("stable-diffusion", "flow-models")]


def preset(name: str, *arguments: str):
    return train.parse([name, *arguments])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_being_written_and_read(name: str) -> None:
    assert from_json(to_json(preset(name))) == preset(name)


@pytest.mark.parametrize("name", REAL)
def test_preset_names_what_exists(name: str) -> None:
    config = preset(name, "--model.random-init")
    assert config.prompts.source in PROMPT_SETS and config.model.name in ARCHITECTURES
    assert all(published_class(parse_term(term)[0]) for term in config.reward.terms)
    assert prompts_of(config.prompts, config.evaluation.prompts, config.seed).evaluated


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_documented_cost_is_the_cost_model_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three digits are written down. Memory traffic is not, and would take most of the time."""
    monkeypatch.setattr(update_cost_module, "update_traffic", lambda *_: None)
    config = preset(name, "--model.random-init", "--memory.micro-batch=4", "--memory.decode-chunk=4")
    cost = update_cost(config, unit_costs(config))
    row = next(line for page in DOCUMENTS for line in page.read_text().splitlines() if line.startswith(f"| `{name}`"))
    trajectories, updates = map(int, re.search(r"\| (\d+) × (\d+) \|", row).groups())
    assert (trajectories, updates) == (update_trajectories(config), config.updates)
    documented = float(re.search(r"\| ([\d,]+) \| [\d.]+", row)[1].replace(",", ""))
    total = (cost.rollout_flops + cost.step_flops) / 1e12
    assert documented == pytest.approx(total, rel=0.01)
    hours = float(re.search(r"\| [\d,]+ \| ([\d.]+)", row)[1])
    assert hours == pytest.approx(total * config.updates / (0.4 * 989) / 3600, abs=0.06)


def test_architectures_have_the_published_numbers_of_parameters() -> None:
    """As the weight files have them: 859,520,964 and 2,567,463,684 in the UNets, 83,653,863 in the VAE."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def count(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        assert count(UNet2DConditionModel(**SD15.network)) == 859_520_964
        assert count(UNet2DConditionModel(**SDXL_BASE.network)) == 2_567_463_684
        assert count(AutoencoderKL(**SD15.vae)) == count(AutoencoderKL(**SDXL_BASE.vae)) == 83_653_863


@pytest.mark.slow
def test_a_planned_preset_dry_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """With the smallest networks, a small flow and a small reward, whose cost is not the preset's."""
    arguments = [f"--model.name={smallest('sd15')}", "--model.height=8", "--model.width=8", "--reward.terms=hue=1"]
    arguments += ["--memory.micro-batch=2", "--memory.decode-chunk=1", "--flow.kind=conv", "--dry-run"]
    assert train.main(["sd15-24gb", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "expected time" in printed and "memory plan for 24.0 GB" in printed


@pytest.mark.slow
def test_stable_diffusion_s_shapes_with_few_channels_run_to_the_end(tmp_path: Path) -> None:
    """8×16 latents, 77 tokens; all but the reward, which would take most of the time. In bfloat16, or float32
    where that takes too long; `test_trainer.py` trains smaller networks in bfloat16 everywhere."""
    run = tmp_path / "run"
    arguments = ["sd15-aesthetic", "--model.random-init", "--model.name=sd15-small", "--reward.terms=hue=1"]
    arguments += ["--updates=1", "--rollout.updates=1", "--rollout.trajectories=2", "--tracker=none", f"--run={run}"]
    arguments += ["--sampler.steps=2", "--rollout.fraction=0.5", "--evaluation.prompts=1", "--evaluation.samples=2"]
    arguments += ["--memory.micro-batch=2", "--memory.decode-chunk=1", f"--model.dtype={NETWORK_DTYPE}"]
    arguments += ["--model.height=64", "--model.width=128"]
    assert train.main(arguments) == 0
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file() and (run / "table.md").is_file()
