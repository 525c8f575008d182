"""Kills a rank inside a checkpoint, lets torchrun's agent start both ranks again, and compares the run with an undisturbed one:
`python -m tests.integration.killed_in_checkpoint --kills 20`."""

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import elastic_launch

from fastnabla.distributed import watchdog
from fastnabla.distributed import world as distributed
from fastnabla.distributed.world import World
from fastnabla.run import checkpoint
from fastnabla.run.checkpoint import Checkpoints
from fastnabla.training.trainer import Trainer
from fastnabla.utils import durable
from tests import faults
from tests.integration import kill_points
from tests.integration.test_rank_failures import TINY, before
from tests.ranks import begin, end, restarting_ranks, trained

CHECKPOINTS = 3
RUNS = {
    "LoRA with a rollout ahead": ["--rollout.replay=1"],
    "sharded weights": ["--lora.rank=0", "--optimizer.learning-rate=1e-4"],
}
WEIGHTS = (3, 1)
"""How often each is drawn: the second takes longer."""
POINTS: dict[tuple[str, int], dict[str, int]] = {
    ("LoRA with a rollout ahead", 0): {"write": 700, "fsync": 5, "rename": 1, "removal": 1, "gather": 12},
    ("LoRA with a rollout ahead", 1): {"gather": 12},
    ("sharded weights", 0): {"write": 20, "fsync": 6, "rename": 1, "removal": 1, "shard": 1},
    ("sharded weights", 1): {"fsync": 1, "shard": 1},
}
"""By run and rank: where it may be killed, and about how many calls a checkpoint makes there."""
ARM: dict[str, Callable[[int, bool], None]] = {
    "write": lambda call, after: kill_points.die_in_write(call),
    "fsync": functools.partial(kill_points.die_in_call, os, "fsync"),
    "rename": functools.partial(kill_points.die_in_call, os, "replace"),
    "removal": functools.partial(kill_points.die_in_call, durable.shutil, "rmtree"),
    "gather": functools.partial(kill_points.die_in_call, World, "all_gather_rows"),
    "shard": functools.partial(kill_points.die_in_call, checkpoint, "write_tensors"),
}
KILLED = Path("killed")
"""Tells that the rank was killed."""


@dataclasses.dataclass(frozen=True)
class Death:
    """Where a rank is killed: before call number `call` of `point`, or after it, since checkpoint number `number` was asked for;
    from 0."""

    rank: int
    point: str
    number: int
    call: int
    after: bool

    @classmethod
    def drawn(cls, draw: random.Random, run: str) -> "Death":
        rank = draw.choice([rank for name, rank in POINTS if name == run])
        point = draw.choice(list(POINTS[run, rank]))
        # The first checkpoint removes none; the last has no rollout ahead.
        number = draw.randrange(point == "removal", CHECKPOINTS - (point == "gather"))
        return cls(rank, point, number, draw.randrange(POINTS[run, rank][point]), draw.random() < 0.5)

    def arm(self) -> None:
        """Die there, if this process is that rank."""
        if os.environ["RANK"] != str(self.rank):
            return
        kill_points.die = functools.partial(_leave_word, kill_points.die)
        before(Checkpoints, "save", self.number, lambda: ARM[self.point](self.call, self.after))


def _leave_word(kill: Callable[[], None]) -> None:
    KILLED.touch()
    kill()


def arguments(run: str) -> list[str]:
    every = ["--rollout.updates=1", "--rollout.trajectories=2", "--checkpoint-every=1", "--checkpoint-keep=1"]
    return [*TINY, *every, f"--updates={CHECKPOINTS}", "--resume=auto", *RUNS[run]]


def process(death: Death, run: str) -> None:
    """A process that torchrun's agent starts."""
    status = trained(
        arguments(run), lambda rank: None if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" else death.arm()
    )
    if status:
        raise SystemExit(status)


def launched(death: Death, run: str) -> None:
    """The run in the current folder, with one restart.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: it has failed twice.
    """
    elastic_launch(restarting_ranks(), process)(death, run)


def result(folder: Path) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The metrics, and the trained weights."""
    (path,) = [*folder.glob("run/lora/*.safetensors"), *folder.glob("run/unet/*.safetensors")]
    return (folder / "run" / "metrics.jsonl").read_bytes(), load_file(path)


def is_equal(folder: Path, expected: Path) -> bool:
    """Whether metrics and weights are the same, bit for bit."""
    (metrics, weights), (metrics_, weights_) = result(folder), result(expected)
    equal = weights.keys() == weights_.keys() and all(torch.equal(weights[name], weights_[name]) for name in weights_)
    return equal and metrics == metrics_


def campaign(folder: Path, kills: int, seed: int) -> collections.Counter[str]:
    """Kill until there were `kills`; how many by place. A run that was not killed is not counted.

    Raises:
        AssertionError: a run differs from the undisturbed one.
    """
    for run in RUNS:
        (folder / run).mkdir()
        with contextlib.chdir(folder / run):
            assert end(begin(2, functools.partial(trained, arguments(run)))) == [0, 0]
    draw, counts, attempt = random.Random(seed), collections.Counter(), 0
    while counts.total() < kills:
        attempt += 1
        run = draw.choices(list(RUNS), WEIGHTS)[0]
        death, started = Death.drawn(draw, run), time.monotonic()
        (folder / str(attempt)).mkdir()
        with contextlib.chdir(folder / str(attempt)):
            launched(death, run)
            assert is_equal(Path(), folder / run), f"{run}: {death} leaves another result"
            killed = KILLED.exists()
        counts.update([f"{run}, rank {death.rank}: {death.point}"] * killed)
        print(
            f"{run}: {death}: {'killed' if killed else 'not reached'}; {time.monotonic() - started:.0f} s", flush=True
        )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    Trainer._write_pictures = lambda *_: None
    Trainer.from_config(faults.tiny())  # imports what every process needs
    watchdog.INTERVAL, watchdog.LINGER, distributed.PATIENCE = 0.1, 0.5, 1.0
    with tempfile.TemporaryDirectory() as name:
        counts = campaign(Path(name), options.kills, options.seed)
    print(f"{counts.total()} kills, all runs equal to the undisturbed one")
    for place, count in sorted(counts.items()):
        print(f"  {place}: {count}")


if __name__ == "__main__":
    main()
