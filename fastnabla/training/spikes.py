"""Losses and gradient norms that are far above their usual values: told, counted, and otherwise let be.

What is usual is the median of the last updates' records, so that a resumed run, which has the same records, tells the same.
"""

import itertools
import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnabla.methods.accumulation import StepReport
from fastnabla.training.guards import place

logger = logging.getLogger("fastnabla")

WATCHED = ("loss", "grad_norm_lora", "grad_norm_flow")
LAST, LEAST = 50, 10
"""Updates whose median is usual; there must be so many at least."""


def usual(records: Sequence[dict[str, Any]], name: str) -> float | None:
    """Median of the absolute values of the metric `name` in the last training `records`; None if there are too few. Those
    that are not finite, which records have as None, do not count."""
    training = itertools.islice((record for record in reversed(records) if record["phase"] == "train"), LAST)
    values = [abs(record[name]) for record in training if record.get(name) is not None]
    return statistics.median(values) if len(values) >= LEAST else None


def spikes(metrics: dict[str, float], records: Sequence[dict[str, Any]], factor: float) -> dict[str, float]:
    """Usual values, by name, of those of the `WATCHED` that are more than `factor` times as large in `metrics`, whose sign
    does not matter, and finite. What is usually 0 has no spikes."""
    found = {name: usual(records, name) for name in WATCHED if math.isfinite(metrics.get(name, math.nan))}
    return {name: value for name, value in found.items() if value and abs(metrics[name]) > factor * value}


def count_spikes(
    update: int,
    metrics: dict[str, float],
    records: Sequence[dict[str, Any]],
    factor: float | None,
    report: StepReport,
    prompts: Sequence[str],
    timestep: Sequence[int],
) -> int:
    """How many of the `WATCHED` are spikes; a warning names them and the row of the batch with the largest part.

    Args:
        update: number of the update.
        metrics: its numbers by name.
        records: the run's before it.
        factor: see `spikes`; None to look for none.
        report: the step's. Its rows are read only if there is a spike, which waits for the device.
        prompts: texts of the prompt numbers.
        timestep: timesteps by step.
    """
    found = spikes(metrics, records, factor) if factor is not None else {}
    if found:
        told = [
            f"{name} is {metrics[name]:.4g}, {abs(metrics[name]) / value:.3g} times its usual {value:.4g}"
            for name, value in found.items()
        ]
        logger.warning("update %d: %s; %s", update, "; ".join(told), _largest(report.rows, prompts, timestep))
    return len(found)


def _largest(rows: dict[str, Tensor], prompts: Sequence[str], timestep: Sequence[int]) -> str:
    """The row with the largest loss, in words; for methods without one by row, the largest of what they have."""
    parts = {name: values for name, values in rows.items() if name.startswith("loss_")}
    if not parts:
        parts = {name: rows[name] for name in ("residual", "ratio", "reward") if name in rows}
    size = torch.stack([values.detach().float().cpu().abs() for values in parts.values()]).sum(0)
    row = int(size.nan_to_num(nan=-1.0).argmax())
    share = f", {size[row] / size.sum():.0%} of {len(size)} rows' sum," if len(size) > 1 else ""
    return f"the largest {' + '.join(parts)}{share} is{place(rows, row, prompts, timestep)}"
