"""Training the runs of a comparison: one after another in this process, or several at a time in separate processes."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from fastnabla.comparison.plan import PlannedRun
from fastnabla.config.train import load_run
from fastnabla.prompts import RunPrompts
from fastnabla.run.resuming import run_to_resume
from fastnabla.training.guards import BoundPassed
from fastnabla.training.trainer import Trainer
from fastnabla.training.whole_run import DIVERGED, train_to_the_end
from fastnabla.utils.console import print_plain

ENDED = (0, BoundPassed.STATUS, DIVERGED)
"""Exit statuses after which the comparison continues: finished, stopped at a bound, or diverged."""


def train_all(runs: Sequence[PlannedRun], console: Console, ended: Callable[[PlannedRun], None]) -> int:
    """Train one run after another.

    Args:
        runs: runs that are not done.
        console: shows the progress.
        ended: called with each run that has ended.

    Returns:
        0, or the exit status of the first run that failed or was stopped.

    Raises:
        ValueError: a run's model, prompts, reward or probe cannot be built.
    """
    for number, run in enumerate(runs, 1):
        print_plain(console, f"run {number} of {len(runs)}: {run.folder}")
        status = _train(run, console)
        if status not in ENDED:
            return status
        ended(run)
        gc.collect()  # free its networks before the next ones are built
    return 0


def _train(run: PlannedRun, console: Console) -> int:
    resumed = run_to_resume(run.config) is not None
    config = load_run(run.folder) if resumed else run.config
    trainer = Trainer.from_config(config, RunPrompts.load(run.folder / "prompts.json") if resumed else None)
    run.folder.mkdir(parents=True, exist_ok=True)
    return train_to_the_end(trainer, run.folder, console, resumed, "the same command")


def train_in_processes(
    runs: Sequence[PlannedRun],
    jobs: int,
    command: Callable[[PlannedRun], Sequence[str]],
    console: Console,
    ended: Callable[[PlannedRun], None],
) -> int:
    """Train `jobs` runs at a time, each in its own process with an equal share of the CPU cores and one GPU, if any.

    The output of a process goes to RUN.log beside the run's folder. If a process fails, or this one is stopped, the others
    are asked to stop and save a checkpoint.

    Args:
        runs, console, ended: see `train_all`.
        jobs: largest number of processes, at least 1.
        command: run → command line that trains it.

    Returns:
        0, or the exit status of the first process that failed.
    """
    jobs = min(jobs, len(runs))
    waiting, working = list(runs), {}
    with _sigterm_raises():
        try:
            while waiting or working:
                for place in set(range(jobs)) - working.keys():
                    if waiting:
                        run = waiting.pop(0)
                        print_plain(console, f"started: {run.folder}")
                        working[place] = run, _start(run, command(run), place, jobs)
                time.sleep(0.2)
                for place, (run, process) in list(working.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del working[place]
                    if status not in ENDED:
                        print_plain(console, f"{run.folder} ended with status {status}; see {_log(run)}", "red")
                        return status
                    print_plain(console, f"ended: {run.folder}; {len(waiting) + len(working)} runs left")
                    ended(run)
        finally:
            for _, process in working.values():
                process.terminate()
            for _, process in working.values():
                process.wait()
    return 0


def _start(run: PlannedRun, command: Sequence[str], place: int, jobs: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = seen if seen != [""] else [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    _log(run).parent.mkdir(parents=True, exist_ok=True)
    with _log(run).open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )


def _log(run: PlannedRun) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def end(_: int, __: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
