"""Bounds on what a run may lose: a reward that is being hacked keeps rising while these are passed."""

import math
from collections.abc import Sequence
from typing import Any

from fastnabla.config.sections import EvaluationConfig


class BoundPassed(Exception):
    """An evaluation has found more lost than the run allows; the message says what, and what can be done."""

    STATUS = 3
    """Exit status of a run that ends so."""


def require_measurable(config: EvaluationConfig, probe: Any | None) -> None:
    """Make sure that `probe` measures what `config` bounds.

    Raises:
        ValueError: it does not.
    """
    if config.stop_above_prior is not None and not hasattr(probe, "features"):
        raise ValueError(
            f"evaluation.stop_above_prior = {config.stop_above_prior!r}: evaluation.probe = {config.probe!r} compares "
            "images and has no features to measure a distance from the prior by; use another, or None."
        )


def passed_bound(config: EvaluationConfig, records: Sequence[dict[str, Any]]) -> str | None:
    """What the newest evaluation among a run's metric `records` has passed, in words; None if nothing.

    Both bounds are relative to the pretrained model's value in evaluation 0. A value that is not finite has passed.
    """
    evaluations = sorted((r for r in records if r["phase"] == "evaluate"), key=lambda record: record["update"])
    for field, name, sign in (
        ("stop_below_diversity", "pairwise_distance", -1),
        ("stop_above_prior", "prior_distance", 1),
    ):
        bound = getattr(config, field)
        if bound is None or len(evaluations) < 2:
            continue
        before, now = (math.nan if r.get(name) is None else r[name] for r in (evaluations[0], evaluations[-1]))
        if not sign * now <= sign * bound * before:
            share = now / before if before else math.nan
            return (
                f"evaluation.{field} = {bound:g} is passed after update {evaluations[-1]['update']}: {name} is {now:.4g}, "
                f"{share:.3g} times the pretrained model's {before:.4g}"
            )
    return None
