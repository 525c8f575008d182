"""Kills training runs at given points or random times, in forks of a process that has everything loaded."""

import json
import os
import random
import signal
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
from fastnabla.run import tracker
from fastnabla.run.checkpoint import CheckpointError
from fastnabla.training.trainer import Trainer
from fastnabla.utils import durable
from tests.training.test_trainer import small
from tests.training.test_trainer import without_pictures as without_pictures


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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_call(owner: object, name: str, call: int, after: bool) -> None:
    """Kill the process in call number `call`, from 0, of the function `owner.name`: before the call or `after` it."""
    function, calls = getattr(owner, name), []

    def dying(*arguments, **options):
        calls.append(None)
        if len(calls) > call and not after:
            kill()
        value = function(*arguments, **options)
        if len(calls) > call:
            kill()
        return value

    setattr(owner, name, dying)


def die_in_record(call: int) -> None:
    """Kill the process after half a line of metrics.jsonl was written."""
    append, calls = tracker.Tracker._append, []

    def dying(self, name, record):
        calls.append(None)
        if len(calls) > call and name == "metrics.jsonl":
            line = json.dumps(record)
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(line[: len(line) // 2])
            kill()
        append(self, name, record)

    tracker.Tracker._append = dying


def die_in_write(call: int) -> None:
    """Kill the process after half a block of a checkpoint file was written."""
    write, calls = durable._Digesting.write, []

    def dying(self, data):
        calls.append(None)
        if len(calls) > call:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            kill()
        return write(self, data)

    durable._Digesting.write = dying


CHECKPOINT_FAILED = 71

POINTS: dict[str, tuple[int, Callable[[Trainer, int, bool], None]]] = {
    "rollout": (15, lambda trainer, call, after: die_in_call(type(trainer.table), "rows", call, after)),
    "micro-batch": (10, lambda trainer, call, after: die_in_call(trainer.step, "gradients", call, after)),
    "optimizer": (5, lambda trainer, call, after: die_in_call(trainer.optimizer, "update", call, after)),
    "record": (8, lambda trainer, call, after: die_in_record(call)),
    "write": (8000, lambda trainer, call, after: die_in_write(call)),
    "fsync": (30, lambda trainer, call, after: die_in_call(os, "fsync", call, after)),
    "rename": (10, lambda trainer, call, after: die_in_call(os, "replace", call, after)),
    "removal": (2, lambda trainer, call, after: die_in_call(durable.shutil, "rmtree", call, after)),
}
"""Where to kill: the approximate number of calls in a run, and a function that makes one of them fatal."""


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


def campaign(
    trainer: Trainer,
    folder: Path,
    expected: Path,
    kills: int,
    seed: int,
    seconds: float,
    points: tuple[str, ...] = tuple(POINTS),
) -> dict[str, int]:
    """Kill and resume runs until there were `kills`, and check each completed run; the number of kills by point.

    Half of the kills come at random times, by SIGKILL or one of the signals that request a stop.

    Args:
        trainer: freshly built.
        folder: for the runs.
        expected: folder of the uninterrupted run, whose result every run must reproduce.
        kills: number of kills.
        seed: of the random choices.
        seconds: duration of an uninterrupted run.
        points: keys of `POINTS`.
    """
    draw, counts, runs = random.Random(seed), {}, 0
    while sum(counts.values()) < kills:
        run, runs = folder / f"run-{runs}", runs + 1
        run.mkdir()
        while True:
            if draw.random() < 0.5:
                sent = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1))
                name, status = sent.name, attempt(trainer, run, lambda: None, draw.uniform(0.05, seconds), sent)
                # -sent: the signal came before its handler was installed.
                assert status in (0, -sent, 128 + sent), (name, status)
            else:
                name = draw.choice(points)
                most, arm = POINTS[name]
                call, after = draw.randrange(most), draw.random() < 0.5
                status = attempt(trainer, run, lambda: arm(trainer, call, after), None, 0)  # noqa: B023
                assert status in (0, -signal.SIGKILL), (name, status)
            if status == 0:
                break
            counts[name] = counts.get(name, 0) + 1
        assert_same_result(run, expected)
    return counts | {"runs": runs}
