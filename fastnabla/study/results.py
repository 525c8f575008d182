"""The results of a study, read from its measured runs."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastnabla.comparison.points import read_points
from fastnabla.cost.budget import planned_decodes
from fastnabla.study.choice import Tuned, chosen_settings, tuned
from fastnabla.study.fronts import Place, place_at
from fastnabla.study.measures import MEASURES, measures_of
from fastnabla.study.measuring import is_measured, read_divergence
from fastnabla.study.parts import end_part, held_out_part, pretrained_part, reference_part, scale_parts, shared_parts
from fastnabla.study.plan import Setting, StudyRun, final_runs, tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.samples import Samples

ALONE = ("reward", "hue_entropy", "accuracy")
"""Measures that need no samples of the prior."""
NAMED = 8
"""Largest number of missing runs that a remark names."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a run has spent."""

    updates: int
    passes: float
    """Measured, in U."""
    decodes: float
    """Planned; a decode with a backward pass is 1, one without is 1/2."""
    seconds: float
    """Of rollouts and updates."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What was measured of a final run."""

    setting: Setting
    seed: int
    pretrained: dict[str, float]
    """Measures of the pretrained model, from the same noise as `end`."""
    end: dict[str, float]
    """Measures at the end of training."""
    path: Sequence[Place]
    """Measures at all scales of the LoRA, from 0 on, with fewer samples."""
    held_out: dict[str, float]
    """Changes of the measures on prompts that the run was not trained on; empty if there are none."""
    divergence: float
    """KL along trajectories without the last two steps, in nats."""
    spent: Spent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All results of a study, which may be incomplete."""

    protocol: Protocol
    tuned: Mapping[str, Sequence[Tuned]]
    """Contender's name → its learning rates that have been tried."""
    settings: Sequence[Setting]
    """The settings chosen from them."""
    runs: Sequence[RunResult]
    """Final runs that have been measured."""
    remarks: Sequence[str]
    """Remarks on runs that are missing or ended early."""

    def of(self, setting: Setting) -> dict[int, RunResult]:
        """Seed → the run of a setting."""
        return {run.seed: run for run in self.runs if run.setting == setting}

    def settings_of(self, name: str) -> list[Setting]:
        """The measured settings of a contender."""
        return [setting for setting in self.settings if setting.name == name and self.of(setting)]

    def at_gain(self, name: str, gain: float) -> tuple[Setting, dict[int, Place]] | None:
        """The contender at a gain of the reward: the setting, and seed → measures, for the seeds that reach it.

        Of its settings it is the one of which most seeds reach the gain; of several, the one whose scale is nearest to 1.
        None if no run reaches it.
        """
        found = {}
        for setting in self.settings_of(name):
            places = {seed: place_at(run.path, gain) for seed, run in self.of(setting).items()}
            found[setting] = {seed: place for seed, place in places.items() if place is not None}

        def order(setting: Setting) -> tuple[int, float]:
            places = found[setting].values()
            return len(places), -sum(abs(place.scale - 1) for place in places) / max(1, len(places))

        best = max(found, key=order, default=None)
        return None if best is None or not found[best] else (best, found[best])


def read_tuning(protocol: Protocol, folder: Path) -> dict[str, list[Tuned]]:
    """The tuning runs that have been measured: contender's name → its learning rates.

    Raises:
        ValueError: a file is damaged.
    """
    changes: dict[Setting, list[tuple[float, float]]] = {}
    diverged: Counter[Setting] = Counter()
    for run in tuning_runs(protocol, folder):
        end = end_part(run, protocol)
        after, before = end.read(), pretrained_part(end, folder).read()
        if run.ended_early or (after is not None and not after.measures.total.isfinite().all()):
            diverged[run.setting] += 1
        elif after is not None and before is not None:
            change = _change(after, before)
            changes.setdefault(run.setting, []).append((change["reward"], -change["hue_entropy"]))
    results: dict[str, list[Tuned]] = {}
    for setting in sorted(changes):
        results.setdefault(setting.name, []).append(tuned(setting, changes[setting], diverged[setting]))
    return {method.name: results[method.name] for method in protocol.methods if method.name in results}


def read_results(protocol: Protocol, folder: Path) -> Results:
    """Read all measured runs.

    Raises:
        ValueError: a file is damaged, or a folder belongs to another run, as after a change of the protocol.
    """
    tuning = _checked(tuning_runs(protocol, folder))
    results = read_tuning(protocol, folder)
    settings = chosen_settings(protocol.methods, results, protocol.final.allowed_losses)
    final = _checked(final_runs(protocol, folder, settings))
    measured = [run for run in final if _has_results(run, protocol, folder)]
    return Results(
        protocol=protocol,
        tuned=results,
        settings=settings,
        runs=[_read_run(run, protocol, folder) for run in measured],
        remarks=[
            *_missing("tuning", tuning, [run for run in tuning if _has_results(run, protocol, folder)]),
            *_missing("final", final, measured),
        ],
    )


def _checked(runs: list[StudyRun]) -> list[StudyRun]:
    for run in runs:
        run.planned.check_folder()
    return runs


def _has_results(run: StudyRun, protocol: Protocol, folder: Path) -> bool:
    shared = shared_parts([run], protocol, folder)
    return run.planned.done and is_measured(run, protocol) and all(part.is_measured for part in shared)


def _missing(kind: str, planned: Sequence[StudyRun], measured: Sequence[StudyRun]) -> list[str]:
    """Remarks on the runs that have not been measured: those that ended early, and others."""
    early = [run.folder.name for run in planned if run.ended_early]
    missing = [run.folder.name for run in planned if run not in measured and not run.ended_early]
    remarks = []
    if missing:
        named = f"; missing are {', '.join(missing)}" if len(missing) <= NAMED else ""
        remarks.append(f"Incomplete: {len(measured)} of {len(planned)} {kind} runs have been measured{named}.")
    if early:
        remarks.append(f"Of the {kind} runs, these ended early and have no results: {', '.join(early)}.")
    return remarks


def _read_run(run: StudyRun, protocol: Protocol, folder: Path) -> RunResult:
    prior = reference_part(run, protocol, folder).read()
    part = end_part(run, protocol)
    end, before = part.read(), pretrained_part(part, folder).read()
    few = protocol.measurement.scale_samples
    path = [Place(0.0, measures_of(before.first(few), prior)), Place(1.0, measures_of(end.first(few), prior))]
    path += [Place(each.scale, measures_of(each.read(), prior)) for each in scale_parts(run, protocol)]
    held_out = held_out_part(run, protocol)
    point = read_points(run.planned)[-1]
    return RunResult(
        setting=run.setting,
        seed=run.seed,
        pretrained=measures_of(before, prior),
        end=measures_of(end, prior),
        path=sorted(path, key=lambda place: place.scale),
        held_out={} if held_out is None else _change(held_out.read(), pretrained_part(held_out, folder).read()),
        divergence=read_divergence(run)["without_last_two"],
        spent=Spent(
            updates=point.update,
            passes=point.passes,
            decodes=planned_decodes(run.planned.config),
            seconds=point.seconds,
        ),
    )


def _change(after: Samples, before: Samples) -> dict[str, float]:
    """Changes of the measures that need no prior, from `before` to `after`."""
    values = {name: (MEASURES[name].of(after, before), MEASURES[name].of(before, before)) for name in ALONE}
    return {name: end - start for name, (end, start) in values.items() if end is not None and start is not None}
