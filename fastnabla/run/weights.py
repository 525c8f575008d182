"""Which weights a run folder has: the last evaluation's, their average, and those of the evaluation with the highest reward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

AVERAGE, BEST = "ema", "best"
"""Folders of a run, in the layout of the run folder itself: lora/ or unet/."""
WeightsName = Literal["raw", "ema", "best"]


def weights_folder(run: Path, weights: WeightsName, decay: float | None) -> Path:
    """Where the run folder `run` has its weights.

    Args:
        run: folder of a run.
        weights: "raw", as the last update left them, their average, or those of the best evaluation.
        decay: of the run's configuration, optimizer.ema.

    Raises:
        ValueError: averaged weights are wanted of a run that has none.
    """
    if weights == "ema" and decay is None:
        raise ValueError(f"weights = 'ema': the run {str(run)!r} was trained without optimizer.ema; use raw.")
    return run / {"raw": "", "ema": AVERAGE, "best": BEST}[weights]


def is_best(reward: float, records: Sequence[dict[str, Any]]) -> bool:
    """Whether `reward` is above that of all evaluations among the metric `records` but the pretrained model's."""
    seen = [r["reward"] for r in records if r["phase"] == "evaluate" and r["update"] > 0 and r["reward"] is not None]
    return not seen or reward > max(seen)
