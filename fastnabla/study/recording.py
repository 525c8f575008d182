"""Turns the measured samples of runs into their records."""

from collections.abc import Sequence
from pathlib import Path

from fastnabla.comparison.points import read_points
from fastnabla.cost.budget import planned_decodes
from fastnabla.run.lock import locked
from fastnabla.study.fronts import Place
from fastnabla.study.measures import MEASURES, measures_of
from fastnabla.study.measuring import is_measured, read_divergence
from fastnabla.study.parts import end_part, held_out_part, pretrained_part, reference_part, scale_parts, shared_parts
from fastnabla.study.plan import StudyRun
from fastnabla.study.protocol import Protocol
from fastnabla.study.records import (
    Record,
    RunResult,
    Spent,
    TuningResult,
    add_records,
    key_of,
    read_records,
    valid_records,
)
from fastnabla.study.samples import Samples

ALONE = ("reward", "hue_entropy", "accuracy")
"""Measures that need no samples of the prior."""


def record_measured(runs: Sequence[StudyRun], protocol: Protocol, folder: Path, file: Path) -> dict[str, Record]:
    """Record those of `runs` that have been measured and have no valid record, and read the records of all of them.

    A record depends on the measured samples only, so one that was lost, as in a crash, is made again.

    Args:
        runs: some runs of the study.
        protocol: of the study.
        folder: of the study.
        file: of its records. It is written only if there are new ones.

    Returns:
        name → record of the runs that have one, in the order of `runs`. The folders of these runs are no longer needed.

    Raises:
        ValueError: a file is damaged, or the folder of a run without a record belongs to another run, as after a change of the
            protocol.
    """
    records = valid_records(runs, protocol, read_records(file))
    waiting = [run for run in runs if run.name not in records]
    for run in waiting:
        run.planned.check_folder()
    new = [record for run in waiting if (record := record_of(run, protocol, folder)) is not None]
    if new:
        with locked(folder, wait=True):  # runs end at the same time
            add_records(file, new)
    return valid_records(runs, protocol, read_records(file)) if new else records


def record_of(run: StudyRun, protocol: Protocol, folder: Path) -> Record | None:
    """The record of a run that ended early or has been measured, together with the pretrained model; None for others.

    Raises:
        ValueError: a file is damaged.
    """
    result = None
    if not run.ended_early:
        shared = shared_parts(run, protocol, folder)
        if not (run.planned.done and is_measured(run, protocol) and all(part.is_measured for part in shared)):
            return None
        if end_part(run, protocol).read().measures.total.isfinite().all():
            result = _run_result(run, protocol, folder) if run.is_final else _tuning_result(run, protocol, folder)
    return Record(setting=run.setting, seed=run.seed, key=key_of(run, protocol), result=result)


def _tuning_result(run: StudyRun, protocol: Protocol, folder: Path) -> TuningResult:
    part = end_part(run, protocol)
    change = _change(part.read(), pretrained_part(part, folder).read())
    return TuningResult(reward=change["reward"], hue_entropy=change["hue_entropy"])


def _run_result(run: StudyRun, protocol: Protocol, folder: Path) -> RunResult:
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
