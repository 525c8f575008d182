"""Inner epochs and older rollouts on two processes: the same run as on one, however often it is stopped and resumed."""

import dataclasses
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, MemoryConfig, RolloutConfig
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.distributed.world import ALONE, World
from fastnabla.training.trainer import Trainer
from tests.faults import tiny, without_pictures
from tests.ranks import on_ranks

STOP = 5


def config() -> TrainConfig:
    """Two rollouts, of which the second is sampled ahead; two updates on each, in two inner epochs. All passes of one row."""
    return dataclasses.replace(
        tiny(),
        updates=8,
        rollout=RolloutConfig(trajectories=4, fraction=0.5, updates=2, epochs=2, replay=1, batch=1),
        memory=MemoryConfig(micro_batch=1, decode_chunk=1),
        evaluation=EvaluationConfig(every=0, samples=2, prompts=1),
        objective=dataclasses.replace(tiny().objective, reward_gradient="terminal"),  # the cheapest
    )


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.step.parameters])


def stopped_and_resumed(world: World, folder: Path) -> Tensor:
    """Weights of a run that a signal to the last rank stops in the second rollout's first update, and that is resumed."""
    trainer, stop = without_pictures(Trainer.from_config(config(), world=world)), StopSignals()
    update = trainer.optimizer.update

    def stopping(*arguments):
        if trainer.done == STOP and world.rank == world.size - 1:
            stop.received = signal.SIGTERM
        return update(*arguments)

    trainer.optimizer.update = stopping
    with pytest.raises(Stopped):
        trainer.train(folder / "run", stop=stop)
    if world.is_main:
        shutil.copytree(folder / "run", folder / "copy")
    world.barrier()
    return resumed(world, folder / "run")


def resumed(world: World, run: Path) -> Tensor:
    trainer = without_pictures(Trainer.from_config(config(), world=world))
    trainer.train(run, resume=True)
    return weights(trainer)


def test_two_processes_and_one_that_goes_on_for_them(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    for name in ("run", "alone"):
        (tmp_path / name).mkdir()
    trainer = without_pictures(Trainer.from_config(config()))
    trainer.train(tmp_path / "alone")
    expected = weights(trainer)
    ranks = on_ranks(tmp_path / "ranks", 2, lambda world: stopped_and_resumed(world, tmp_path))
    assert torch.equal(*ranks)
    for found in (ranks[0], resumed(ALONE, tmp_path / "copy")):
        assert (found - expected).norm() < 1e-6 * expected.norm()
