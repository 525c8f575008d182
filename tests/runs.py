"""Runs of seconds, on a model of one level that stands in for the testbed: they have all of its parts but its depth."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from fastnabla.config.model_sections import ModelConfig, RewardConfig, SamplerConfig
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import ComputeConfig, EvaluationConfig, OptimizerConfig, RolloutConfig
from fastnabla.models.random_init import random_pipeline
from fastnabla.training.trainer import Trainer
from tests.families import one_level


@functools.cache
def smallest(family: str) -> str:
    """The folder of a pipeline of `family` with one level and random weights, which is removed with this process."""
    above = Path(tempfile.mkdtemp(prefix="fastnabla-"))
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    random_pipeline(one_level(family), {"default": torch.float32}).save_pretrained(above / f"tiny-{family}")
    return str(above / f"tiny-{family}")


def small(**changes) -> TrainConfig:
    """Four updates, with look-ahead reward gradients, all reverse residuals, and the default layout."""
    preset = PRESETS["testbed"][1]
    config = dataclasses.replace(
        preset,
        model=ModelConfig(name=smallest("sd15"), dtype="float32", height=8, width=8),
        reward=RewardConfig(terms=("hue=1",)),
        objective=dataclasses.replace(preset.objective, reward_gradient="lookahead", reverse_fraction=1.0),
        compute=ComputeConfig(),
        updates=4,
        checkpoint_every=2,
        tracker="none",
        sampler=SamplerConfig(steps=4, guidance_scale=3.0),
        rollout=RolloutConfig(trajectories=4, fraction=0.5, updates=2),
        evaluation=EvaluationConfig(every=2, samples=2, prompts=2, probe="pixels"),
        optimizer=OptimizerConfig(schedule="linear", warmup=2),
    )
    return dataclasses.replace(config, **changes)


ON_SMALLEST = [f"--model.name={smallest('sd15')}", "--model.dtype=float32", "--model.height=8", "--model.width=8"]
ON_SMALLEST += ["--reward.terms", "hue=1", "--evaluation.probe=pixels"]
"""What `small` changes in the testbed's preset, as command-line arguments."""


def on_testbed(config: TrainConfig) -> TrainConfig:
    """`config` with the testbed's model, rewards and probe."""
    preset = PRESETS["testbed"][1]
    evaluation = dataclasses.replace(config.evaluation, probe="testbed")
    return dataclasses.replace(config, model=preset.model, reward=preset.reward, evaluation=evaluation)


def without_pictures(trainer: Trainer) -> Trainer:
    """Disable pictures, which take most of the time of a small run and are not part of its state."""
    trainer._write_pictures = lambda *_: None
    return trainer


def train(config: TrainConfig, folder: Path) -> Path:
    """Run without pictures."""
    folder.mkdir()
    without_pictures(Trainer.from_config(config)).train(folder)
    return folder


def copy_after_update_1(trainer: Trainer, folder: Path, copy: Path) -> None:
    """Make the training that comes copy its `folder`, with a checkpoint, as a signal would leave it after the first update."""
    update = trainer.update

    def copying(*arguments) -> None:
        if trainer.done == 1:
            trainer.save(wait=True)
            shutil.copytree(folder, copy)
            assert (copy / "checkpoints" / "update-000001").is_dir()
        update(*arguments)

    trainer.update = copying


def interrupt(trainer: Trainer, call: int) -> None:
    """Make the training that comes fail in the optimizer's call number `call`, from 1."""
    update, calls = trainer.optimizer.update, []

    def interrupted(*arguments) -> dict[str, torch.Tensor]:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return update(*arguments)

    trainer.optimizer.update = interrupted
