"""Measures what grows over thousands of updates, one method after the other, on networks of a few thousand parameters:
`python -m tests.soak`.

Not part of the test suite: a leak of a few bytes an update shows only after thousands of updates.
"""

import argparse
import dataclasses
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch

from fastnabla.config.method_sections import Direct
from fastnabla.config.methods import METHODS
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig
from fastnabla.training.trainer import Trainer
from tests.faults import tiny
from tests.runs import on_testbed, smallest, without_pictures

EVERY = 50
"""Updates between two readings."""


def config_of(method: str, updates: int, testbed: bool) -> TrainConfig:
    """The run of a soak: evaluations, checkpoints and TensorBoard often enough to show what they keep."""
    config = dataclasses.replace(
        tiny(),
        method=method,
        updates=updates,
        checkpoint_every=50,
        tracker="tensorboard",
        direct=Direct(k=1, late=0.5),
        spike_factor=1e9,
        evaluation=EvaluationConfig(every=200 if testbed else 100, samples=2, prompts=1, probe="pixels"),
    )
    if testbed:
        return on_testbed(config)
    family = "sd3" if METHODS[method].needs_flow_model else "sd15"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=smallest(family)))


def readings(method: str, updates: int, testbed: bool) -> np.ndarray:
    """Readings of a run every `EVERY` updates: update, resident bytes, open files, bytes of metrics.jsonl and of timing.jsonl.

    Args:
        method: of the run.
        updates: its length.
        testbed: train the testbed, with pictures, instead of the smallest networks without.
    """
    torch.set_num_threads(1)
    process, rows = psutil.Process(), []
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        trainer = Trainer.from_config(config_of(method, updates, testbed))
        if not testbed:
            without_pictures(trainer)
        update = trainer.update

        def read(*arguments) -> None:
            update(*arguments)
            if trainer.done % EVERY == 0:
                sizes = ((run / name).stat().st_size for name in ("metrics.jsonl", "timing.jsonl"))
                rows.append((trainer.done, process.memory_info().rss, process.num_fds(), *sizes))

        trainer.update = read
        trainer.train(run)
    return np.array(rows, dtype=float)


def row(method: str, found: np.ndarray, warm_up: int) -> str:
    """A row of the table: growth by least squares from update `warm_up` on."""
    late = found[found[:, 0] >= warm_up]
    memory, metrics, timing = (float(np.polyfit(late[:, 0], late[:, column], 1)[0]) for column in (1, 3, 4))
    return (
        f"| {method} | {found[-1, 0]:.0f} | {late[0, 1] / 1e6:.1f} to {late[-1, 1] / 1e6:.1f} MB | {memory / 1e3:+.2f} MB | "
        f"{late[:, 2].min():.0f} to {late[:, 2].max():.0f} | {metrics:.0f} | {timing:.0f} |"
    )


HEAD = """\
| Run | Updates | Resident memory | in 1000 updates | Open files | metrics.jsonl, bytes an update | timing.jsonl |
| --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--warm-up", type=int, default=500, help="first updates, which are ignored")
    parser.add_argument("--testbed", action="store_true", help="train the testbed, with pictures")
    arguments = parser.parse_args()
    print(HEAD, flush=True)
    context = multiprocessing.get_context("spawn")
    for method in arguments.methods:  # each in a process of its own, so that none grows for the one before it
        with ProcessPoolExecutor(1, context) as alone:
            found = alone.submit(readings, method, arguments.updates, arguments.testbed).result()
        print(row(method, found, arguments.warm_up), flush=True)


if __name__ == "__main__":
    main()
