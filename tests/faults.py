"""Trains tiny runs in forks of a process that has everything loaded, and compares what they leave."""

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastnabla.config.model_sections import SamplerConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, RolloutConfig
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.run.checkpoint import CheckpointError
from fastnabla.training.trainer import Trainer
from tests.runs import small


def tiny(**changes) -> TrainConfig:
    """A run of a second or two: three rollouts of two updates each, with a checkpoint after each."""
    return small(
        updates=6,
        sampler=SamplerConfig(steps=2, guidance_scale=1),
        rollout=RolloutConfig(trajectories=2, fraction=0.5, updates=2),
        evaluation=EvaluationConfig(every=4, samples=2, prompts=1),
        **changes,
    )


def result(run: Path) -> tuple[bytes, dict[str, torch.Tensor], str]:
    """What is bitwise equal in two equal runs: metrics, final weights, table."""
    weights = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    return (run / "metrics.jsonl").read_bytes(), weights, (run / "table.md").read_text()


def assert_same_result(run: Path, expected: Path) -> None:
    (metrics, weights, table), (metrics_, weights_, table_) = result(run), result(expected)
    assert metrics == metrics_
    assert table == table_
    assert weights.keys() == weights_.keys()
    assert all(torch.equal(weights[name], weights_[name]) for name in weights)


CHECKPOINT_FAILED = 71


def attempt(trainer: Trainer, run: Path, arm: Callable[[], None], kill_after: float | None, sent: int) -> int:
    """Start or resume the run in a fork of this process; the exit status, negative for a fatal signal.

    Args:
        trainer: freshly built; not changed in this process.
        run: the run folder.
        arm: called in the fork before training.
        kill_after: seconds until the fork is sent the signal `sent`; None for never.
        sent: see `kill_after`.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            arm()
            with StopSignals() as stop:
                trainer.train(run, resume=(run / "config.json").exists(), stop=stop)
            status = 0
        except Stopped as stopped:
            status = stopped.status
        except CheckpointError:
            status = CHECKPOINT_FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # skip the test process's cleanup
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, sent)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
