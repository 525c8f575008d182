"""Makes the results of a study from the records of its runs."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastnabla.study.choice import Tuned, chosen_settings, tuned
from fastnabla.study.fronts import Place, place_at
from fastnabla.study.plan import Setting, StudyRun, final_runs, tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.recording import record_measured
from fastnabla.study.records import Record, RunResult, key_differences, key_of, read_records

NAMED = 8
"""Largest number of runs that a remark names."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AtGain:
    """A contender where its reward has gained a stated amount."""

    setting: Setting
    places: Mapping[int, Place]
    """Seed → measures, for the seeds that reach the gain."""
    is_complete: bool
    """Whether all final seeds of the protocol have been measured and reach the gain."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All results of a study, which may be incomplete."""

    protocol: Protocol
    tuned: Mapping[str, Sequence[Tuned]]
    """Contender's name → its learning rates that have been tried."""
    settings: Mapping[Setting, Sequence[str]]
    """The settings chosen from them, and what for (`chosen_settings`)."""
    runs: Sequence[RunResult]
    """Final runs that have been measured."""
    remarks: Sequence[str]
    """Remarks on runs that are missing or ended early, and on records that are not used."""

    def of(self, setting: Setting) -> dict[int, RunResult]:
        """Seed → the run of a setting."""
        return {run.seed: run for run in self.runs if run.setting == setting}

    def settings_of(self, name: str) -> list[Setting]:
        """The measured settings of a contender."""
        return [setting for setting in self.settings if setting.name == name and self.of(setting)]

    def at_gain(self, name: str, gain: float) -> AtGain | None:
        """The contender where its reward has gained `gain`; None if no run gets there.

        Of its settings it is the one with which most seeds get there, among the seeds that all of them have, so that it does
        not depend on which runs come first. Of several, it is the one whose scale is nearest to 1.
        """
        found = {}
        for setting in self.settings_of(name):
            places = {seed: place_at(run.path, gain) for seed, run in self.of(setting).items()}
            found[setting] = {seed: place for seed, place in places.items() if place is not None}
        found = {setting: places for setting, places in found.items() if places}
        shared = set.intersection(*(set(self.of(setting)) for setting in found)) if found else set()

        def order(setting: Setting) -> tuple[int, float]:
            scales = [place.scale for seed, place in found[setting].items() if seed in shared]
            return len(scales), -sum(abs(scale - 1) for scale in scales) / max(1, len(scales))

        best = max(found, key=order, default=None)
        if best is None:
            return None
        return AtGain(
            setting=best, places=found[best], is_complete=found[best].keys() == set(self.protocol.final.seeds)
        )


def read_results(protocol: Protocol, folder: Path, file: Path) -> Results:
    """Record the runs that have been measured, and make the results from the records.

    Args:
        protocol: of the study.
        folder: of the study.
        file: of its records.

    Raises:
        ValueError: see `record_measured`.
    """
    tuning = tuning_runs(protocol, folder)
    of_tuning = record_measured(tuning, protocol, folder, file)
    results = tuning_results(protocol, of_tuning.values())
    settings = chosen_settings(protocol.methods, results, protocol.final.allowed_losses)
    final = final_runs(protocol, folder, settings)
    of_final = record_measured(final, protocol, folder, file)
    every, records = [*tuning, *final], read_records(file)
    return Results(
        protocol=protocol,
        tuned=results,
        settings=settings,
        runs=[record.result for record in of_final.values() if record.result is not None],
        remarks=[
            *_missing("tuning", tuning, of_tuning),
            *_missing("final", final, of_final),
            *stale_records(every, protocol, records),
            *_unchosen(every, records),
        ],
    )


def tuning_results(protocol: Protocol, records: Iterable[Record]) -> dict[str, list[Tuned]]:
    """Summarise the records of tuning runs: contender's name → its learning rates."""
    changes: dict[Setting, list[tuple[float, float]]] = {}
    diverged: Counter[Setting] = Counter()
    for record in records:
        if record.result is None:
            diverged[record.setting] += 1
        else:
            changes.setdefault(record.setting, []).append((record.result.reward, -record.result.hue_entropy))
    results: dict[str, list[Tuned]] = {}
    for setting in sorted(changes):
        results.setdefault(setting.name, []).append(tuned(setting, changes[setting], diverged[setting]))
    return {method.name: results[method.name] for method in protocol.methods if method.name in results}


def _missing(kind: str, runs: Sequence[StudyRun], records: Mapping[str, Record]) -> list[str]:
    """Remarks on the runs without results: those without a record, and those that diverged."""
    missing = [run.name for run in runs if run.name not in records]
    diverged = [name for name, record in records.items() if record.result is None]
    remarks = []
    if missing:
        named = f"; missing are {', '.join(missing)}" if len(missing) <= NAMED else ""
        measured = len(records) - len(diverged)
        remarks.append(f"Incomplete: {measured} of {len(runs)} {kind} runs have been measured{named}.")
    if diverged:
        remarks.append(f"Of the {kind} runs, these ended early and have no results: {', '.join(diverged)}.")
    return remarks


def stale_records(runs: Sequence[StudyRun], protocol: Protocol, records: Mapping[str, Record]) -> list[str]:
    """Remarks on the `records` of `runs` that do not count, because the protocol has changed."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.name in records and (changed := key_differences(records[run.name].key, key_of(run, protocol))):
            names.setdefault(", ".join(changed), []).append(run.name)
    return [f"Records that do not count, because of another {why}: {_list(own)}." for why, own in names.items()]


def _unchosen(runs: Sequence[StudyRun], records: Mapping[str, Record]) -> list[str]:
    """A remark on records of other runs than `runs`."""
    names = list(records.keys() - {run.name for run in runs})
    return [f"Records of runs that the protocol lacks or does not choose: {_list(sorted(names))}."] if names else []


def _list(names: Sequence[str]) -> str:
    """The first names and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
