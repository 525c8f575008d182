"""Lets each operation on a run's folder fail, and all after it, and resumes the run: `python -m tests.integration.disk_campaign`.

The run must end with status 0, or with status 1 and one line that names the folder and the cause. Resumed on a disk that works, it must
equal the uninterrupted run bit for bit.
"""

import argparse
import dataclasses
import errno
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

from fastnabla.run import pictures
from fastnabla.training.trainer import Trainer
from fastnabla.training.whole_run import train_to_the_end
from fastnabla.utils.console import command_console
from tests.faults import attempt, tiny
from tests.integration.failing_disk import FULL, FailingDisk
from tests.integration.kill_campaign import equal

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
BLOCKS = 100
"""Of the writes of one file in a row, every so many are tried: torch.save writes hundreds of blocks."""


def build() -> Trainer:
    """A run of two updates with everything that a run writes: the curves stand for all pictures, and are empty."""
    config = dataclasses.replace(tiny(), updates=2, tracker="tensorboard")
    trainer = Trainer.from_config(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=0.5)))
    pictures.curves = lambda records: Figure((1, 1))
    trainer._write_pictures = lambda records, columns: pictures.save_curves(trainer.folder / "curves.png", records)
    return trainer


def on_disk(trainer: Trainer, run: Path, disk: FailingDisk) -> tuple[int, list[str], list[str]]:
    """Start the run on `disk` in a fork. Returns its exit status, the lines on stderr, and the operations that were counted."""
    told, counted = run.with_suffix(".stderr"), run.with_suffix(".operations")
    child = os.fork()
    if child == 0:
        status = 70
        try:
            sys.stderr = told.open("w", encoding="utf-8", buffering=1)
            command_console()
            with disk.patched():
                status = train_to_the_end(trainer, run, Console(quiet=True), False, f"resume {run}")
        except BaseException as error:
            print(f"not caught: {error!r}", file=sys.stderr)
        finally:
            counted.write_text("\n".join(disk.operations))
            os._exit(status)  # skip the test process's cleanup
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, told.read_text().splitlines(), counted.read_text().splitlines()


def fault(trainer: Trainer, run: Path, expected: Path, fails_from: int, error: int) -> str:
    """Start the run on a disk that fails, and resume it on one that works. What is wrong, in words; empty if nothing is."""
    run.mkdir()
    disk = FailingDisk(run, fails_from, error, named=error not in FULL)
    status, lines, operations = on_disk(trainer, run, disk)
    at = f"{os.strerror(error)} from operation {fails_from} ({operations[fails_from] if len(operations) > fails_from else 'none'})"
    if len(operations) <= fails_from:
        return f"{at}: not reached"
    messages = [line for line in lines if line.startswith("error: ")]
    if status == 1 and not (
        len(messages) == len(lines) == 1 and str(run) in lines[0] and os.strerror(error) in lines[0]
    ):
        return f"{at}: {lines}"
    if status not in (0, 1):
        return f"{at}: status {status}, {lines}"
    if attempt(trainer, run, lambda: None, None, 0) != 0 or not equal(run, expected):
        return f"{at}: resumed, it differs"
    return ""


def tried(operations: list[str]) -> list[int]:
    """The numbers of the operations to fail: all, but of writes in a row every `BLOCKS`."""
    found, row = [], 0
    for number, operation in enumerate(operations):
        row = row + 1 if operation.startswith("write") else 0
        if row % BLOCKS <= 1:
            found.append(number)
    return found


def main() -> int:
    """Print a Markdown table by error. The exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--errors", nargs="+", type=lambda name: getattr(errno, name), default=ERRORS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    print("| Error | Operations of the run | Tried | Wrong |\n| --- | --- | --- | --- |", flush=True)
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer, expected = build(), folder / "expected"
        expected.mkdir()
        build().train(expected)
        for error in arguments.errors:
            whole = folder / f"whole-{error}"
            whole.mkdir()
            status, lines, operations = on_disk(
                trainer, whole, FailingDisk(whole, math.inf, error, named=error not in FULL)
            )
            assert status == 0, lines
            numbers = tried(operations)
            found = [fault(trainer, folder / f"{error}-{number}", expected, number, error) for number in numbers]
            found = list(filter(None, found))
            print(f"| {os.strerror(error)} | {len(operations)} | {len(numbers)} | {len(found)} |", flush=True)
            wrong += found
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
