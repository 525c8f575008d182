"""The path of a run's samples as its LoRA is scaled from 0, the pretrained model, through 1 and beyond."""

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """The measures of a run at one scale."""

    scale: float
    measures: dict[str, float]


def place_at(path: Sequence[Place], gain: float) -> Place | None:
    """The measures where the reward has first risen by `gain`. None if it rises by less.

    Between the scales, the reward and the measures follow monotone cubics (PCHIP; Fritsch, Butland 1984). Chords would
    overestimate what is lost: entropies and squared distances start quadratically in the scale.

    Args:
        path: places ordered by scale, from scale 0 on. Each has the measure "reward".
        gain: > 0.
    """
    wanted = path[0].measures["reward"] + gain
    for before, after in itertools.pairwise(path):
        if before.measures["reward"] < wanted <= after.measures["reward"]:
            return _between(path, before.scale, after.scale, wanted)
    return None


def _between(path: Sequence[Place], low: float, high: float, reward: float) -> Place:
    """The place with this reward between the neighbouring scales `low` and `high`, where it rises through `reward`."""
    from scipy.interpolate import PchipInterpolator  # takes a second to import
    from scipy.optimize import brentq

    scales = [place.scale for place in path]
    curves = {name: PchipInterpolator(scales, [place.measures[name] for place in path]) for name in path[0].measures}
    scale = brentq(lambda at: curves["reward"](at) - reward, low, high)
    return Place(scale, {name: curve(scale).item() for name, curve in curves.items()})
