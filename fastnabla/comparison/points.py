"""What a run's folder says of it: a point for every evaluation, with all that was spent by then."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fastnabla.comparison.budget import measured_passes, measured_rows
from fastnabla.comparison.plan import PlannedRun
from fastnabla.cost.update_cost import update_trajectories

NOT_METRICS = ("phase", "update")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A run as it was evaluated after some updates."""

    variant: str
    seed: int
    update: int
    passes: float
    """U spent, as measured; rollouts included, evaluations not."""
    trajectories: int
    """Sampled to learn from."""
    transitions: int
    """Trained on, repeats counted; of a method that samples in its step, the trajectories."""
    seconds: float
    """In rollouts and updates; not in evaluations, checkpoints, nor before the first update after a start."""
    metrics: dict[str, float]
    """Of the evaluation, by name."""


def read_points(run: PlannedRun) -> list[Point]:
    """The points of a run that has begun, the pretrained model (update 0) first.

    Raises:
        ValueError: its metrics cannot be read.
    """
    config = run.config
    took = seconds_by_update(read_lines(run.folder / "timing.jsonl"))
    points, passes, transitions, seconds = [], 0.0, 0, 0.0
    for record in read_lines(run.folder / "metrics.jsonl"):
        update = record["update"]
        if record["phase"] == "train":
            passes += measured_passes(config, record)
            transitions += measured_rows(config, record)
            seconds += took[update]
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
                    metrics={name: value for name, value in record.items() if name not in NOT_METRICS},
                )
            )
    return points


def seconds_by_update(records: list[dict[str, Any]]) -> dict[int, float]:
    """Update → seconds since what came before it, of the records of `timing.jsonl`, whose clock starts anew with each
    process."""
    took, before = {}, 0.0
    for record in records:
        if record["phase"] == "train":
            took[record["update"]] = record["seconds"] - before
        before = record["seconds"]
    return took


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines.

    Raises:
        ValueError: it cannot be read, or has a line that is no JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove the run's folder to repeat it.") from error
