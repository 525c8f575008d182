"""Summaries of points: means over seeds, the Pareto front, and points of equal reward."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from fastnabla.comparison.points import Point


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Mean, lowest and highest value over seeds."""

    mean: float
    low: float
    high: float
    left_out: int = 0
    """Number of values that are not finite, and so left out."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of the values that are finite; nan if there are none."""
        finite = [value for value in values if math.isfinite(value)] or [math.nan]
        return cls(statistics.fmean(finite), min(finite), max(finite), sum(not math.isfinite(v) for v in values))

    def times(self, factor: float) -> "Spread":
        """The spread of the values multiplied by a positive factor."""
        return Spread(factor * self.mean, factor * self.low, factor * self.high, self.left_out)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The spread over seeds of points of one variant."""

    updates: Spread
    passes: Spread
    transitions: Spread
    seconds: Spread
    metrics: dict[str, Spread]

    @classmethod
    def of(cls, points: Sequence[Point]) -> "Mean":
        """Summarise at least one point, one per seed, with the metrics that all of them have."""
        spent = {
            name: Spread.of([getattr(point, field) for point in points])
            for name, field in (
                ("updates", "update"), ("passes", "passes"), ("transitions", "transitions"), ("seconds", "seconds")
            )
        }  # fmt: skip
        names = [name for name in points[0].metrics if all(name in point.metrics for point in points)]
        return cls(**spent, metrics={name: Spread.of([point.metrics[name] for point in points]) for name in names})


def changes(points: Sequence[Point]) -> list[Point]:
    """Subtract the metrics of the run's pretrained model, which has the same prompts and noise, from each point."""
    starts = {(point.variant, point.seed): point.metrics for point in points if point.update == 0}
    changed = []
    for point in points:
        start = starts[point.variant, point.seed]
        metrics = {name: value - start[name] for name, value in point.metrics.items() if name in start}
        changed.append(dataclasses.replace(point, metrics=metrics))
    return changed


def along_training(points: Sequence[Point], variant: str) -> list[Mean]:
    """Means over seeds of a variant's points, ordered by update."""
    own = [point for point in points if point.variant == variant]
    return [Mean.of([point for point in own if point.update == update]) for update in sorted({p.update for p in own})]


def pretrained(points: Sequence[Point]) -> Mean:
    """The pretrained model. All variants share its prompts and noise, so each seed counts once."""
    return Mean.of(list({point.seed: point for point in points if point.update == 0}.values()))


def last(points: Sequence[Point], variant: str) -> Mean:
    """Mean over seeds of a variant's last points."""
    return along_training(points, variant)[-1]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front: points for which no other is at least as high in both coordinates and higher in one."""

    def beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
        return other[0] >= point[0] and other[1] >= point[1] and other != point

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def common_rewards(points: Sequence[Point]) -> dict[int, float]:
    """Seed → the highest reward that every variant reaches: the minimum of the runs' best rewards.

    The pretrained model and rewards that are not finite do not count. A run without any other reward is left out.
    """
    best: dict[int, dict[str, float]] = {}
    for point in points:
        if _is_trained(point):
            runs = best.setdefault(point.seed, {})
            runs[point.variant] = max(runs.get(point.variant, float("-inf")), point.metrics["reward"])
    return {seed: min(rewards.values()) for seed, rewards in best.items()}


def matched(points: Sequence[Point]) -> list[Point]:
    """The point of each run whose reward is nearest to `common_rewards` of its seed, of the points that count there. Ties go to
    the first point."""
    rewards = common_rewards(points)

    def distance(point: Point) -> float:
        return abs(point.metrics["reward"] - rewards[point.seed])

    nearest: dict[tuple[str, int], Point] = {}
    for point in points:
        run = (point.variant, point.seed)
        if _is_trained(point) and (run not in nearest or distance(point) < distance(nearest[run])):
            nearest[run] = point
    return list(nearest.values())


def _is_trained(point: Point) -> bool:
    """Whether it is a finetuned model's point, with a finite reward."""
    return point.update > 0 and math.isfinite(point.metrics["reward"])
