"""The weights in a run folder: the last evaluation's, their average, and those of the evaluation with the highest reward."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastnabla.models.pipeline import save_policy
from fastnabla.models.policy import Policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.utils.durable import move_files

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


def write_weights(run: Path, policy: Policy, ema: WeightAverage | None, best: bool, is_main: bool) -> None:
    """Write the policy's weights into the run folder. Files are moved into place once all are written. Collective if sharded.

    Args:
        run: a run folder.
        policy: whose trained weights are written.
        ema: their average, written too; None if the run has none.
        best: write them as the best evaluation's too.
        is_main: whether this is rank 0, which writes the files.
    """
    partial = run / ".weights.partial"
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    save_policy(policy, partial, policy.dtype, is_main)
    if best and is_main:
        for folder in list(partial.iterdir()):
            shutil.copytree(folder, partial / BEST / folder.name)
    if ema is not None:
        with ema.applied():
            save_policy(policy, partial / AVERAGE, policy.dtype, is_main)
    if is_main:
        move_files(partial, run)
