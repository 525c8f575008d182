"""The points of a run, read from its folder: each is an evaluation together with the cost up to then."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fastnabla.comparison.plan import PlannedRun
from fastnabla.cost.budget import measured_passes, measured_rows
from fastnabla.cost.update_cost import update_trajectories
from fastnabla.run.tracker import readable_records

NOT_METRICS = ("phase", "update")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An evaluation of a run after some updates."""

    variant: str
    seed: int
    update: int
    passes: float
    """Measured cost in U, including rollouts but not evaluations."""
    trajectories: int
    """Number of trajectories sampled for training."""
    transitions: int
    """Number of transitions trained on, including repeats; trajectories for a method that samples within its step."""
    seconds: float
    """Duration of rollouts and updates. Evaluations, checkpoints and the set-up after a start do not count."""
    untimed: int
    """Number of updates that `timing.jsonl` lacks, as after a crash of the machine. `seconds` may lack them too."""
    metrics: dict[str, float]
    """Metrics of the evaluation, by name; nan for one that is not finite."""


def read_points(run: PlannedRun) -> list[Point]:
    """Read the points of a run that has started. The pretrained model (update 0) comes first.

    Raises:
        ValueError: the run's metrics cannot be read.
    """
    config = run.config
    durations = seconds_by_update(readable_records(run.folder / "timing.jsonl"))
    points, passes, transitions, seconds, untimed = [], 0.0, 0, 0.0, 0
    for record in read_lines(run.folder / "metrics.jsonl"):
        update = record["update"]
        if record["phase"] == "train":
            passes += measured_passes(config, record)
            transitions += measured_rows(config, record)
            seconds += durations.get(update, 0.0)
            untimed += update not in durations
        elif record["phase"] == "evaluate":
            points.append(
                Point(
                    variant=run.variant,
                    seed=config.seed,
                    update=update,
                    passes=passes,
                    trajectories=update * update_trajectories(config) // config.rollout.epochs,
                    transitions=transitions,
                    seconds=seconds,
                    untimed=untimed,
                    metrics={n: math.nan if v is None else v for n, v in record.items() if n not in NOT_METRICS},
                )
            )
    return points


def seconds_by_update(records: list[dict[str, Any]]) -> dict[int, float]:
    """Update → seconds since the previous record of `timing.jsonl`, without the stall of a checkpoint that was saved in between.

    The clock restarts with each process. A checkpoint is recorded once it is written, often after the update that it delayed.
    """
    saved = [record for record in records if record["phase"] == "checkpoint"]
    stalls = {record["update"]: record.get("checkpoint_stall_seconds", 0.0) for record in saved}
    durations, before, done = {}, 0.0, 0
    for record in records:
        phase, seconds = record["phase"], record["seconds"] - before
        if phase == "train":
            durations[record["update"]] = seconds - stalls.get(done, 0.0)
            done = record["update"]
        elif phase == "checkpoint" and seconds >= stalls.get(done, 0.0):
            stalls[done] = 0.0  # the stall ended before this record
        before = record["seconds"]
    return durations


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON Lines file.

    Raises:
        ValueError: the file cannot be read, or a line is not JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove the run's folder to repeat it.") from error
