"""Trains, measures and records the runs of a study, one after another or several at a time."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fastnabla.comparison.plan import PlannedRun
from fastnabla.comparison.training import train_all, train_in_processes
from fastnabla.study.choice import chosen_settings
from fastnabla.study.claims import require_measured
from fastnabla.study.measures import measures_of
from fastnabla.study.measuring import measure_pretrained, measure_run
from fastnabla.study.parts import end_part, pretrained_part
from fastnabla.study.plan import ENDED_EARLY, Setting, StudyRun, final_runs, tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.recording import record_measured
from fastnabla.study.records import read_records
from fastnabla.study.results import stale_records, tuning_results
from fastnabla.utils.console import print_plain
from fastnabla.utils.durable import write_file
from fastnabla.utils.require import require


def run_study(protocol: Protocol, folder: Path, file: Path, jobs: int, command: Sequence[str], console: Console) -> int:
    """Train, measure and record all runs without a record: those that tune the learning rates, then those of the chosen
    settings.

    Args:
        protocol: what to do.
        folder: of the study.
        file: of its records.
        jobs: number of processes.
        command: the command line of this study, which is repeated with ``--only RUN`` for each process.
        console: shows the progress.

    Returns:
        0, or the exit status of the first run that failed or was stopped.

    Raises:
        ValueError: a folder belongs to another run, a run's model, prompts, reward or probe cannot be built, the probe cannot
            measure what the claims need, a file is damaged, or no tuning run of a method ended.
    """

    def train(run: StudyRun) -> int:
        return run_one(run, protocol, folder, file, console)

    for runs in (lambda: tuning_runs(protocol, folder), lambda: _chosen(protocol, folder, file)):
        planned = runs()
        for remark in stale_records(planned, protocol, read_records(file)):
            print_plain(console, remark)
        records = record_measured(planned, protocol, folder, file)
        waiting = [run for run in planned if run.name not in records]
        print_plain(console, f"{len(records)} of {len(planned)} runs are complete")
        for run in waiting[:1]:
            measure_pretrained(run, protocol, folder, console)
            before = pretrained_part(end_part(run, protocol), folder).read()
            require_measured(protocol.claims, measures_of(before, before))
        status = _run_all(waiting, train, jobs, command, console)
        if status:
            return status
    return 0


def run_one(run: StudyRun, protocol: Protocol, folder: Path, file: Path, console: Console) -> int:
    """Train a run, unless it has been, measure it and record it. A run that ends early is recorded too. Returns the exit status.

    The first run of a seed measures the pretrained model too; others of the seed that end meanwhile wait for it.
    """
    if not (run.planned.done or run.ended_early):
        if status := train_all([run.planned], console, lambda _: None):
            return status
        if not run.planned.done:
            write_file(run.folder / ENDED_EARLY, f"{run.name} ended early. docs/comparison.md says how to repeat it.\n")
    if run.ended_early:
        print_plain(console, f"{run.name} ended early, so it has no results; docs/comparison.md says how to repeat it")
    else:
        measure_run(run, protocol, console)
        measure_pretrained(run, protocol, folder, console)
    record_measured([run], protocol, folder, file)
    return 0


def run_named(names: Sequence[str], protocol: Protocol, folder: Path, file: Path, console: Console) -> int:
    """`run_one` for the runs with these names that have no record, in turn.

    Raises:
        ValueError: a name belongs to no run, a folder to another run, or a file is damaged.
    """
    every = [Setting(method.name, rate) for method in protocol.methods for rate in method.learning_rates]
    known = {run.name: run for run in (*tuning_runs(protocol, folder), *final_runs(protocol, folder, every))}
    for name in names:
        require(name in known, "only", name, "is no run of the protocol; the names are METHOD,LEARNING_RATE-seed-N.")
    records = record_measured([known[name] for name in names], protocol, folder, file)
    for name in names:
        if name in records:
            print_plain(console, f"{name} has been recorded in {file}")
        elif status := run_one(known[name], protocol, folder, file, console):
            return status
    return 0


def _chosen(protocol: Protocol, folder: Path, file: Path) -> list[StudyRun]:
    records = record_measured(tuning_runs(protocol, folder), protocol, folder, file)
    results = tuning_results(protocol, records.values())
    missing = [method.name for method in protocol.methods if method.is_tuned and method.name not in results]
    if missing:
        raise ValueError(
            f"methods: no tuning run of {', '.join(missing)} ended; remove them, or change their settings."
        )
    return final_runs(protocol, folder, chosen_settings(protocol.methods, results, protocol.final.allowed_losses))


def _run_all(
    runs: Sequence[StudyRun], train: Callable[[StudyRun], int], jobs: int, command: Sequence[str], console: Console
) -> int:
    if min(jobs, len(runs)) > 1:
        return train_in_processes([run.planned for run in runs], jobs, _with_only(command), console, lambda _: None)
    for number, run in enumerate(runs, 1):
        print_plain(console, f"run {number} of {len(runs)}: {run.name}")
        if status := train(run):
            return status
    return 0


def _with_only(command: Sequence[str]) -> Callable[[PlannedRun], Sequence[str]]:
    return lambda run: [sys.executable, "-m", "fastnabla.study", *command, "--only", run.folder.name]
