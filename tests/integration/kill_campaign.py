"""Kills training runs in every phase, resumes them, and compares what they leave with uninterrupted runs:
`python -m tests.integration.kill_campaign`.

A run is killed up to twice in one phase. Runs of one process must then equal the uninterrupted one bit for bit. Runs of two
processes must have its weights and metrics to rounding, as `tests/integration/test_sharded_training.py` says.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, OptimizerConfig, RolloutConfig
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import World
from fastnabla.training.trainer import Trainer
from tests.faults import attempt, tiny
from tests.integration.kill_points import POINTS, SHARDED, SPILLED, Point
from tests.integration.test_full_finetuning import full
from tests.ranks import begin
from tests.runs import without_pictures

KILLS_OF_A_RUN = 2
RANDOM = {f"random moment, {sent.name}": sent for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)}
TWO_RANDOM = "2 processes: random moment"
ROUNDING, METRICS_ROUNDING = 1e-6, 1e-3
"""Largest relative differences between runs of two processes: of the weights, and of the metrics."""


def averaged(**changes) -> TrainConfig:
    """`tiny`, with an average of the weights."""
    config = tiny(**changes)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=0.5))


def spilling() -> TrainConfig:
    """Three rollouts, one sampled ahead, in host memory with outputs in 8 bits; each is learned from twice."""
    memory = dataclasses.replace(tiny().memory, buffer="pinned", output_block=64)
    rollout = RolloutConfig(trajectories=2, fraction=0.5, updates=1, epochs=2, replay=1)
    return dataclasses.replace(averaged(), memory=memory, rollout=rollout)


def sharded() -> TrainConfig:
    """Three updates of all parameters, with an average of them, evaluations and checkpoints after the first two."""
    evaluation = EvaluationConfig(every=2, samples=2, prompts=1)
    optimizer = OptimizerConfig(learning_rate=1e-4, ema=0.5)
    return dataclasses.replace(full(), updates=3, evaluation=evaluation, optimizer=optimizer)


def files(run: Path) -> dict[str, bytes]:
    """By name, what is equal in two equal runs: metrics, table, and all weights outside checkpoints."""
    paths = [run / "metrics.jsonl", run / "table.md", *run.glob("lora/*"), *run.glob("*/lora/*"), *run.glob("*/unet/*")]
    paths += run.glob("unet/*")
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def equal(run: Path, expected: Path) -> bool:
    """Whether two runs are equal bit for bit."""
    return files(run) == files(expected)


def close(run: Path, expected: Path) -> bool:
    """Whether two runs of two processes are equal to rounding."""
    found, other = files(run), files(expected)
    if found.keys() != other.keys():
        return False
    for name in (name for name in found if name.endswith(".safetensors")):
        ours, theirs = (
            torch.cat([w.flatten().double() for w in load_file(f / name).values()]) for f in (run, expected)
        )
        if (ours - theirs).norm() > ROUNDING * theirs.norm():
            return False
    ours, theirs = ([json.loads(line) for line in f["metrics.jsonl"].splitlines()] for f in (found, other))
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(ours: dict, theirs: dict) -> bool:
    def near(name: str) -> bool:
        a, b = ours[name], theirs[name]
        return a == b or (not isinstance(b, str | None) and abs(a - b) <= METRICS_ROUNDING * abs(b) + 1e-6)

    return ours.keys() == theirs.keys() and all(map(near, ours))


@dataclasses.dataclass
class Count:
    """Of a phase: kills, and the completed runs by whether they equal the uninterrupted one."""

    kills: int = 0
    runs: int = 0
    differences: int = 0
    bitwise: int = 0


@dataclasses.dataclass
class Single:
    """Runs of one process, in forks of this one.

    Args:
        trainer: freshly built.
        expected: folder of the uninterrupted run.
        seconds: that it took.
    """

    trainer: Trainer
    expected: Path
    seconds: float
    same = staticmethod(equal)

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> "Single":
        """Runs of `config`, of which this makes the uninterrupted one in `folder`."""
        folder.mkdir()
        trainer, another = (without_pictures(Trainer.from_config(config)) for _ in range(2))
        started = time.perf_counter()
        another.train(folder)  # in this process, which then has all loaded
        return cls(trainer, folder, time.perf_counter() - started)

    def die(self, run: Path, point: Point, draw: random.Random) -> bool:
        """Start or resume the run and let it die at `point`; whether it did before its end."""
        call, after = draw.randrange(point.calls), draw.random() < 0.5
        status = attempt(self.trainer, run, lambda: point.arm(self.trainer, call, after), None, 0)
        assert status in (0, -signal.SIGKILL), status
        return status != 0

    def signalled(self, run: Path, sent: signal.Signals, draw: random.Random) -> bool:
        """Start or resume the run and send it a signal at a random moment; whether it came before the end."""
        status = attempt(self.trainer, run, lambda: None, draw.uniform(0.05, self.seconds), sent)
        assert status in (0, -sent, 128 + sent), status  # -sent: before its handler was installed
        return status != 0

    def finish(self, run: Path) -> None:
        """Resume the run to its end."""
        assert attempt(self.trainer, run, lambda: None, None, 0) == 0


@dataclasses.dataclass
class Pair:
    """Runs of two processes. When one of them is dead, the other is killed.

    Args:
        config: of the runs.
        expected: folder of the uninterrupted run.
        seconds: that it took.
    """

    config: TrainConfig
    expected: Path
    seconds: float = 0.0
    same = staticmethod(close)

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> "Pair":
        """Runs of `config`, of which this makes the uninterrupted one in `folder`."""
        folder.mkdir()
        pair, started = cls(config, folder), time.perf_counter()
        pair.finish(folder)
        pair.seconds = time.perf_counter() - started
        return pair

    def die(self, run: Path, point: Point, draw: random.Random) -> bool:
        """Start or resume the run and let one process die at `point`; whether it did before its end."""
        call, after, victim = draw.randrange(point.calls), draw.random() < 0.5, draw.randrange(2)
        return self._train(run, lambda trainer: point.arm(trainer, call, after), victim, None)

    def signalled(self, run: Path, sent: signal.Signals, draw: random.Random) -> bool:
        """Start or resume the run and send one process a signal at a random moment; whether it came before the end."""
        return self._train(run, lambda trainer: None, draw.randrange(2), (draw.uniform(0.05, self.seconds), sent))

    def finish(self, run: Path) -> None:
        """Start or resume the run to its end."""
        assert not self._train(run, lambda trainer: None, 0, None)

    def _train(
        self, run: Path, arm: Callable[[Trainer], None], victim: int, kill: tuple[float, signal.Signals] | None
    ) -> bool:
        resume = (run / "config.json").exists()

        def rank() -> int:
            world = World.start(RankInfo.of())
            trainer = without_pictures(Trainer.from_config(self.config, world=world))
            if world.rank == victim:
                arm(trainer)
            trainer.train(run, resume=resume)
            return world.shutdown(0)

        children = begin(2, rank)
        if kill is not None:
            time.sleep(kill[0])
            os.kill(children[victim], kill[1])
        status = os.waitstatus_to_exitcode(os.waitpid(children[victim], 0)[1])
        if status:
            os.kill(children[1 - victim], signal.SIGKILL)
        other = os.waitstatus_to_exitcode(os.waitpid(children[1 - victim], 0)[1])
        assert status == -signal.SIGKILL or status == other == 0, (status, other)
        return status != 0


def subjects(phases: Iterable[str], folder: Path) -> dict[str, Single | Pair]:
    """What runs are killed in each of `phases`; each kind is built once."""
    build = functools.cache(lambda kind, config: kind.of(config(), folder / config.__name__))
    of = {name: (Single, averaged) for name in (*POINTS, *RANDOM)} | {name: (Single, spilling) for name in SPILLED}
    of |= {name: (Pair, sharded) for name in (*SHARDED, TWO_RANDOM)}
    return {name: build(*of[name]) for name in phases}


PHASES = (*POINTS, *SPILLED, *SHARDED, *RANDOM, TWO_RANDOM)
"""Names of all phases."""


def campaign(of: dict[str, Single | Pair], folder: Path, kills: int, seed: int) -> dict[str, Count]:
    """Kill and resume runs, phase by phase in turn, until there were `kills`, and compare each with the uninterrupted one.

    Args:
        of: what is killed in each phase; see `subjects`.
        folder: for the runs.
        kills: their number. The run that is killed last is completed too.
        seed: of the random choices.
    """
    draw, points, number = random.Random(seed), POINTS | SPILLED | SHARDED, 0
    signals = RANDOM | {TWO_RANDOM: signal.SIGKILL}
    counts = {name: Count() for name in of}
    while sum(count.kills for count in counts.values()) < kills:
        for name, count in counts.items():
            run, number, before = folder / f"run-{number}", number + 1, count.kills
            run.mkdir()
            for _ in range(KILLS_OF_A_RUN):
                one = of[name]
                died = one.signalled(run, signals[name], draw) if name in signals else one.die(run, points[name], draw)
                if not died:
                    break
                count.kills += 1
            else:
                one.finish(run)
            if count.kills > before:
                count.runs += 1
                count.bitwise += equal(run, one.expected)
                count.differences += not one.same(run, one.expected)
                print(f"{name}: killed {count.kills - before} times", file=sys.stderr, flush=True)
            if sum(count.kills for count in counts.values()) >= kills:
                break
    return counts


def table(counts: dict[str, Count]) -> str:
    """The counts as Markdown."""
    lines = [
        "| Killed in | Kills | Completed runs | Equal bit for bit | Differences |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = [
        sum(getattr(count, name) for count in counts.values()) for name in ("kills", "runs", "bitwise", "differences")
    ]
    for name, count in counts.items():
        lines.append(f"| {name} | {count.kills} | {count.runs} | {count.bitwise} | {count.differences} |")
    return "\n".join([*lines, "| all | {} | {} | {} | {} |".format(*total)])


def main() -> int:
    """Print the table. The exit status is 1 if a run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, metavar="PHASE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as name:
        counts = campaign(subjects(arguments.phases, Path(name)), Path(name), arguments.kills, arguments.seed)
    print(table(counts))
    return int(any(count.differences for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
