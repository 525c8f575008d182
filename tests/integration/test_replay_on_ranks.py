"""Inner epochs, older rollouts and prompts that are encoded as they are needed, on two processes: the same run as on one."""

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, MemoryConfig, RolloutConfig
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.distributed.world import ALONE, World
from fastnabla.models import pipeline as pipelines
from fastnabla.models.cached_conditions import CachedConditions
from fastnabla.training.trainer import Trainer
from tests.faults import tiny
from tests.ranks import on_ranks
from tests.runs import without_pictures


def config() -> TrainConfig:
    """Two rollouts, both sampled before the first update; one update in each of two inner epochs. All passes of one row. Half of
    the inner transitions have a reverse residual."""
    return dataclasses.replace(
        tiny(),
        updates=4,
        rollout=RolloutConfig(trajectories=2, fraction=0.5, updates=1, epochs=2, replay=1, batch=1),
        memory=MemoryConfig(micro_batch=1, decode_chunk=1),
        evaluation=EvaluationConfig(every=0, samples=2, prompts=1),
        objective=dataclasses.replace(tiny().objective, reward_gradient="terminal", reverse_fraction=0.5),
    )


def build(world: World) -> Trainer:
    trainer = without_pictures(Trainer.from_config(config(), world=world))
    assert isinstance(trainer.policy.conditions, CachedConditions)
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.step.parameters])


def stopped_and_resumed(world: World, folder: Path) -> dict[str, Any]:
    """What is left of a run that a signal to the last rank stops between the second rollout's inner epochs; its copy as it was
    then is resumed by another number of processes."""
    trainer, stop = build(world), StopSignals()
    update = trainer.optimizer.update

    def stopping(*arguments):
        if trainer.done == 3 and world.rank == world.size - 1:
            stop.received = signal.SIGTERM
        return update(*arguments)

    trainer.optimizer.update = stopping
    with pytest.raises(Stopped):
        trainer.train(folder / "run", stop=stop)
    if world.is_main:
        shutil.copytree(folder / "run", folder / "copy")
    world.barrier()
    return resumed(trainer, folder / "run")


def resumed(trainer: Trainer, run: Path) -> dict[str, Any]:
    """Weights at the end, and the passes of the last update."""
    trainer.components.buffer.clear()
    records = trainer.train(run, resume=True)
    passes = [record["passes_inner"] for record in records if record["phase"] == "train"][-1]
    return {"weights": weights(trainer), "passes": passes}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_and_one_that_goes_on_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each encodes its own prompts, one at a time, and reads the reference network's part from its own cache."""
    monkeypatch.setattr(pipelines, "DEVICE_BYTES", 2 * 4096)
    monkeypatch.setattr(pipelines, "HOST_BYTES", 4096)
    for name in ("run", "alone"):
        (tmp_path / name).mkdir()
    alone = build(ALONE)
    alone.train(tmp_path / "alone")
    expected = weights(alone)
    ranks = on_ranks(tmp_path / "ranks", 2, lambda world: stopped_and_resumed(world, tmp_path))
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    for found in (ranks[0], resumed(alone, tmp_path / "copy")):
        assert (found["weights"] - expected).norm() < 1e-6 * expected.norm()
        assert found["passes"] == 3  # 5 without the cache
