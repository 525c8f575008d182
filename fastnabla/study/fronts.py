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
    """The measures where the reward has first risen by `gain`, interpolated linearly between neighbouring scales. None if it
    rises by less.

    Args:
        path: places ordered by scale, from scale 0 on. Each has the measure "reward".
        gain: > 0.
    """
    wanted = path[0].measures["reward"] + gain
    for before, after in itertools.pairwise(path):
        low, high = before.measures["reward"], after.measures["reward"]
        if low < wanted <= high:
            share = (wanted - low) / (high - low)
            measures = {n: v + share * (after.measures[n] - v) for n, v in before.measures.items()}
            return Place(before.scale + share * (after.scale - before.scale), measures)
    return None
