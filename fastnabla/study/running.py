"""Trains and measures the runs of a study, one after another or several at a time."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fastnabla.comparison.plan import PlannedRun
from fastnabla.comparison.training import train_all, train_in_processes
from fastnabla.study.choice import chosen_settings
from fastnabla.study.claims import require_measured
from fastnabla.study.measures import measures_of
from fastnabla.study.measuring import is_measured, measure_pretrained, measure_run
from fastnabla.study.parts import end_part, pretrained_part
from fastnabla.study.plan import ENDED_EARLY, Setting, StudyRun, final_runs, tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.results import read_tuning
from fastnabla.utils.console import print_plain
from fastnabla.utils.durable import write_file
from fastnabla.utils.require import require


def run_study(protocol: Protocol, folder: Path, jobs: int, command: Sequence[str], console: Console) -> int:
    """Train and measure all runs that have not been: those that tune the learning rates, then those of the chosen settings.

    Args:
        protocol: what to do.
        folder: of the study.
        jobs: number of processes.
        command: the command line of this study, which is repeated with ``--only RUN`` for each process.
        console: shows the progress.

    Returns:
        0, or the exit status of the first run that failed or was stopped.

    Raises:
        ValueError: a folder belongs to another run, a run's model, prompts, reward or probe cannot be built, the probe cannot
            measure what the claims need, or no tuning run of a method ended.
    """
    for runs in (lambda: tuning_runs(protocol, folder), lambda: _chosen(protocol, folder)):
        planned = runs()
        for run in planned:
            run.planned.check_folder()
        waiting = [run for run in planned if not is_complete(run, protocol)]
        print_plain(console, f"{len(planned) - len(waiting)} of {len(planned)} runs are complete")
        measure_pretrained(planned, protocol, folder, console)
        for run in planned[:1]:  # there is none if nothing is tuned
            before = pretrained_part(end_part(run, protocol), folder).read()
            require_measured(protocol.claims, measures_of(before, before))
        status = _run_all(waiting, protocol, jobs, command, console)
        if status:
            return status
    return 0


def is_complete(run: StudyRun, protocol: Protocol) -> bool:
    """Whether nothing is left to do: the run has been trained and measured, or it ended early."""
    return run.ended_early or (run.planned.done and is_measured(run, protocol))


def run_one(run: StudyRun, protocol: Protocol, console: Console) -> int:
    """Train a run, unless it has been, and measure it. A run that ends early is not repeated. Returns the exit status."""
    if not (run.planned.done or run.ended_early):
        if status := train_all([run.planned], console, lambda _: None):
            return status
        if not run.planned.done:
            write_file(run.folder / ENDED_EARLY, f"{run.folder.name} ended early. Remove this folder to repeat it.\n")
    if run.ended_early:
        print_plain(console, f"{run.folder.name} ended early; remove {run.folder} to repeat it")
        return 0
    measure_run(run, protocol, console)
    return 0


def run_named(names: Sequence[str], protocol: Protocol, folder: Path, console: Console) -> int:
    """`run_one` for the runs whose folders have these names, in turn.

    Raises:
        ValueError: a name belongs to no run, or a folder to another run.
    """
    every = [Setting(method.name, rate) for method in protocol.methods for rate in method.learning_rates]
    known = {run.folder.name: run for run in (*tuning_runs(protocol, folder), *final_runs(protocol, folder, every))}
    for name in names:
        require(name in known, "only", name, "is no run of the protocol; the names are METHOD,LEARNING_RATE-seed-N.")
        known[name].planned.check_folder()
    for name in names:
        if status := run_one(known[name], protocol, console):
            return status
    return 0


def _chosen(protocol: Protocol, folder: Path) -> list[StudyRun]:
    results = read_tuning(protocol, folder)
    missing = [method.name for method in protocol.methods if method.is_tuned and method.name not in results]
    if missing:
        raise ValueError(
            f"methods: no tuning run of {', '.join(missing)} ended; remove them, or change their settings."
        )
    return final_runs(protocol, folder, chosen_settings(protocol.methods, results, protocol.final.allowed_losses))


def _run_all(runs: Sequence[StudyRun], protocol: Protocol, jobs: int, command: Sequence[str], console: Console) -> int:
    if min(jobs, len(runs)) > 1:
        return train_in_processes([run.planned for run in runs], jobs, _with_only(command), console, lambda _: None)
    for number, run in enumerate(runs, 1):
        print_plain(console, f"run {number} of {len(runs)}: {run.folder.name}")
        if status := run_one(run, protocol, console):
            return status
    return 0


def _with_only(command: Sequence[str]) -> Callable[[PlannedRun], Sequence[str]]:
    return lambda run: [sys.executable, "-m", "fastnabla.study", *command, "--only", run.folder.name]
