"""Runs that train all of the UNet's parameters, and other optimizers and draws, cut down to seconds."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fastnabla.config.model_sections import LoraConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, OptimizerConfig, RolloutConfig
from fastnabla.sample import SampleConfig, sample_run
from fastnabla.training.guards import warn_of_learning_rate
from fastnabla.training.trainer import Trainer
from tests.runs import interrupt, small, smallest, train, without_pictures


def full(**changes) -> TrainConfig:
    """Two updates of all parameters."""
    return small(
        updates=2,
        checkpoint_every=1,
        lora=LoraConfig(rank=0),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        rollout=RolloutConfig(trajectories=2, fraction=0.5, updates=1),
        evaluation=EvaluationConfig(every=1, samples=2, prompts=1),
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(full(), tmp_path_factory.mktemp("full") / "run")


@pytest.mark.slow
def test_writes_a_network_that_was_trained(run: Path) -> None:
    assert not (run / "lora").exists()
    before = UNet2DConditionModel.from_pretrained(smallest("sd15"), subfolder="unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(run / "unet").state_dict()
    assert after.keys() == before.keys()
    steps = {name: (after[name] - before[name]).abs().max().item() for name in after}
    assert all(0 < step < 1e-3 for step in steps.values()), steps


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    trainer = without_pictures(Trainer.from_config(full()))
    interrupt(trainer, 2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["update-000001"]
    without_pictures(Trainer.from_config(full())).train(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    ours, theirs = (UNet2DConditionModel.from_pretrained(folder / "unet").state_dict() for folder in (tmp_path, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("rate", "warned"), [(1e-3, True), (1e-4, False)])
def test_the_learning_rate_of_a_lora_is_warned_of(rate: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(full(), optimizer=OptimizerConfig(learning_rate=rate))
    Trainer.from_config(config)
    said = "optimizer.learning_rate = 0.001: suits a LoRA, but lora.rank = 0"
    assert (said in caplog.text and "use --optimizer.learning-rate 1e-5" in caplog.text) == warned
    warn_of_learning_rate(dataclasses.replace(config, lora=LoraConfig()))
    assert caplog.text.count("lora.rank = 0") == warned


@pytest.mark.slow
def test_is_sampled(run: Path, tmp_path: Path, drawn: None) -> None:
    """Into a picture of more than one grey."""
    picture = sample_run(SampleConfig(run=run, n=2, output=tmp_path / "picture.png"))
    pixels = torch.frombuffer(bytearray(Image.open(picture).convert("RGB").tobytes()), dtype=torch.uint8)
    assert len(pixels.unique()) > 10


def test_has_no_lora_to_scale(run: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_scale: .* trained all parameters \(lora\.rank = 0\)"):
        sample_run(SampleConfig(run=run, lora_scale=(0.5,)))


@pytest.mark.slow
def test_8_bit_optimizer_and_runs(tmp_path: Path) -> None:
    """Of 2 transitions a run and T = 4: 6 + 2 tails / L with one tail, or two where the run goes on at the first step."""
    config = small(updates=2, optimizer=OptimizerConfig(name="adamw8bit", learning_rate=1e-3))
    config = dataclasses.replace(config, rollout=RolloutConfig(trajectories=4, fraction=0.5, updates=2, draw="runs"))
    records = [json.loads(line) for line in (train(config, tmp_path / "run") / "metrics.jsonl").open()]
    passes = [record["passes_inner"] for record in records if record["phase"] == "train"]
    assert len(passes) == 2
    # Two trajectories an update, each with one tail (and a follower) or two.
    assert set(passes) <= {7.0, 7.5, 8.0}
    assert records[-1]["reward"] != records[0]["reward"]
