"""The path of a run's samples as its LoRA is scaled from 0, the pretrained model, through 1 and beyond."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """The measures of a run at one scale."""

    scale: float
    measures: dict[str, float]


def place_at(path: Sequence[Place], gain: float) -> Place | None:
    """The measures where the reward has first risen by `gain`. None if it rises by less. A measure that is not finite at the
    neighbouring scales is nan.

    Between the scales, the reward and the measures follow monotone cubics (PCHIP; Fritsch, Butland 1984). Chords would
    overestimate what is lost: entropies and squared distances start quadratically in the scale.

    Args:
        path: places ordered by scale, from scale 0 on. Each has the measure "reward".
        gain: > 0.
    """
    wanted = path[0].measures["reward"] + gain
    for before, after in itertools.pairwise(path):
        if before.measures["reward"] < wanted <= after.measures["reward"]:
            return _between(path, before, after, wanted)
    return None


def _between(path: Sequence[Place], before: Place, after: Place, reward: float) -> Place:
    """The place with this reward between neighbouring places, where it rises through `reward`."""
    from scipy.optimize import brentq  # takes a second to import

    rewards, scale = _curve(path, "reward"), after.scale
    if after.measures["reward"] > reward:
        scale = brentq(lambda at: rewards(at) - reward, before.scale, after.scale)
    ends = (before.measures, after.measures)
    measures = {
        name: _curve(path, name)(scale).item() if all(math.isfinite(end[name]) for end in ends) else math.nan
        for name in after.measures
    }
    return Place(scale, measures)


def _curve(path: Sequence[Place], name: str) -> Callable[[float], Any]:
    """Scale → the measure, through its finite values."""
    from scipy.interpolate import PchipInterpolator

    finite = [place for place in path if math.isfinite(place.measures[name])]
    return PchipInterpolator([place.scale for place in finite], [place.measures[name] for place in finite])
