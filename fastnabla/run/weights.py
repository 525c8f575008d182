"""The weights in a run folder: those of the last evaluation, their average, and those with the highest evaluated reward.

This module does not import torch.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

AVERAGE, BEST = "ema", "best"
"""Folders of a run, in the layout of the run folder itself: lora/ or unet/."""
WeightsName = Literal["raw", "ema", "best"]


def weights_folder(run: Path, weights: WeightsName, decay: float | None) -> Path:
    """The folder of weights in the run folder `run`.

    Args:
        run: a run folder.
        weights: "raw", the last evaluation's; "ema", their average; "best", those of the best evaluation.
        decay: the run's `optimizer.ema`.

    Raises:
        ValueError: the run has no averaged weights.
    """
    if weights == "ema" and decay is None:
        raise ValueError(f"weights = 'ema': the run {str(run)!r} was trained without optimizer.ema; use raw.")
    return run / {"raw": "", "ema": AVERAGE, "best": BEST}[weights]


def is_best(reward: float, records: Sequence[dict[str, Any]]) -> bool:
    """Whether `reward` is higher than in every evaluation in `records`. The pretrained model's does not count."""
    seen = [r["reward"] for r in records if r["phase"] == "evaluate" and r["update"] > 0 and r["reward"] is not None]
    return not seen or reward > max(seen)


def update_of(weights: WeightsName, records: Sequence[dict[str, Any]]) -> int | None:
    """The update after which the run's `weights` were written, by its metric `records`; None if there was no evaluation."""
    seen = [r for r in records if r["phase"] == "evaluate" and r["update"] > 0]
    if weights == BEST:
        rewards = [math.nan if r["reward"] is None else r["reward"] for r in seen]
        seen = [r for number, r in enumerate(seen) if is_best(rewards[number], seen[:number])]
    return seen[-1]["update"] if seen else None
