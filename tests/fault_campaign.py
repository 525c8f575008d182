"""Kills training runs at random, resumes them, and compares the results with an uninterrupted run:
`python -m tests.fault_campaign --kills 50`."""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from fastnabla.training.trainer import Trainer
from tests.faults import campaign, tiny, without_pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer, expected = without_pictures(Trainer.from_config(tiny())), folder / "expected"
        expected.mkdir()
        started = time.perf_counter()
        without_pictures(Trainer.from_config(tiny())).train(expected)
        seconds = time.perf_counter() - started
        counts = campaign(trainer, folder, expected, arguments.kills, arguments.seed, seconds)
    runs = counts.pop("runs")
    print(f"{sum(counts.values())} kills, {runs} completed runs, all equal to the uninterrupted one")
    for point, count in sorted(counts.items()):
        print(f"  {point}: {count}")


if __name__ == "__main__":
    main()
