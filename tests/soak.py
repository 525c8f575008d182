"""Measures what grows over thousands of tiny updates of the testbed: `python -m tests.soak --seconds 480`.

Not part of the test suite: a leak of a few bytes an update shows only after thousands of updates.
"""

import argparse
import dataclasses
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from fastnabla.config.training_sections import EvaluationConfig, RolloutConfig
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.training.trainer import Trainer
from tests.faults import tiny

EVERY = 50
"""Updates between two readings."""


class Soak:
    """Collects readings of a run: (update, resident bytes, open file descriptors, bytes of metrics.jsonl and timing.jsonl).

    Args:
        trainer: the trainer of the run.
        run: the run folder.
        stop: receives a SIGTERM after `seconds`.
        seconds: duration of the run.
    """

    def __init__(self, trainer: Trainer, run: Path, stop: StopSignals, seconds: float) -> None:
        self.run, self.stop, self.until = run, stop, time.monotonic() + seconds
        self.process, self.updates, self.readings = psutil.Process(), 0, []
        self._update, trainer.optimizer.update = trainer.optimizer.update, self.update

    def update(self, *arguments):
        """Replaces the optimizer's `update`, and takes a reading every `EVERY` updates."""
        norms = self._update(*arguments)
        self.updates += 1
        if self.updates % EVERY == 0:
            sizes = ((self.run / name).stat().st_size for name in ("metrics.jsonl", "timing.jsonl"))
            self.readings.append((self.updates, self.process.memory_info().rss, self.process.num_fds(), *sizes))
            if time.monotonic() > self.until:
                self.stop.received = signal.SIGTERM
        return norms

    def report(self, warm_up: int) -> str:
        """Growth from update `warm_up` on, by least squares; for memory also in the first and second half of it."""
        readings = np.array([reading for reading in self.readings if reading[0] >= warm_up], dtype=float)

        def slope(column: int, rows: np.ndarray) -> float:
            return float(np.polyfit(rows[:, 0], rows[:, column], 1)[0])

        halves = np.array_split(readings, 2)
        first, last = readings[0], readings[-1]
        return (
            f"{self.updates} updates; from update {first[0]:.0f} on:\n"
            f"  resident memory {first[1] / 1e6:.1f} to {last[1] / 1e6:.1f} MB, {slope(1, readings) / 1e3:+.2f} MB "
            f"in 1000 updates ({slope(1, halves[0]) / 1e3:+.2f} in the first half, {slope(1, halves[1]) / 1e3:+.2f} in "
            "the second)\n"
            f"  open file descriptors {readings[:, 2].min():.0f} to {readings[:, 2].max():.0f}\n"
            f"  metrics.jsonl {slope(3, readings):.0f} bytes an update, timing.jsonl {slope(4, readings):.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--warm-up", type=int, default=300, help="first updates, which are ignored")
    parser.add_argument("--tracker", default="tensorboard")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = dataclasses.replace(
        tiny(),
        updates=1_000_000,
        checkpoint_every=50,
        tracker=arguments.tracker,
        rollout=RolloutConfig(trajectories=2, fraction=0.5, updates=2),
        evaluation=EvaluationConfig(every=200, samples=2, prompts=1, probe="testbed"),
    )
    with tempfile.TemporaryDirectory() as name:
        trainer, stop = Trainer.from_config(config), StopSignals()
        soak = Soak(trainer, Path(name), stop, arguments.seconds)
        try:
            trainer.train(Path(name), stop=stop)
        except Stopped:
            print(soak.report(arguments.warm_up))


if __name__ == "__main__":
    main()
