"""The tables of a comparison."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fastnabla.comparison.points import Point
from fastnabla.comparison.sheet import Sheet
from fastnabla.comparison.summary import Mean, Spread, common_rewards, last, matched, pretrained
from fastnabla.evaluation.report import DIVERGENCES
from fastnabla.metrics.diversity import hue_entropy_ceiling

METRICS = ("reward", "pairwise_distance", "hue_entropy", "vendi", "prior_distance", "dark_grounds", "accuracy")
"""Metrics shown as columns, if available."""
SPENT = ("updates", "passes", "transitions", "seconds")


def final_sheet(points: Sequence[Point], samples: int) -> Sheet:
    """The pretrained model, and each variant at the end of training, evaluated on `samples` per prompt."""
    means = {variant: last(points, variant) for variant in _variants(points)}
    return _sheet("At the end of training", {"pretrained": pretrained(points), **means}, samples)


def matched_sheet(points: Sequence[Point], samples: int) -> Sheet:
    """The pretrained model, and each variant at the evaluation nearest to the highest reward that all methods reach. The
    evaluations have `samples` per prompt. Variants whose rewards are not finite have no row."""
    nearest, reward = matched(points), _cell(Spread.of(list(common_rewards(points).values())))
    means = {variant: Mean.of([p for p in nearest if p.variant == variant]) for variant in _variants(nearest)}
    title = f"At the evaluation nearest to the highest reward that every method reaches, {reward}"
    return _sheet(title, {"pretrained": pretrained(points), **means}, samples)


def target_sheets(evaluations: Mapping[str, Sequence[dict[str, Any]]]) -> list[Sheet]:
    """Distances from the tilted target, one sheet per group of prompts.

    Args:
        evaluations: variant → results of `fastnabla.evaluate`, one per seed.
    """
    groups = dict.fromkeys(name for results in evaluations.values() for result in results for name in result["groups"])
    return [_target_sheet(group, evaluations) for group in groups]


def _target_sheet(group: str, evaluations: Mapping[str, Sequence[dict[str, Any]]]) -> Sheet:
    of_variant = {m: [r["groups"][group] for r in results] for m, results in evaluations.items()}
    targets = {variant: [each["targets"]["tilted"] for each in seen] for variant, seen in of_variant.items()}
    names = next((list(first["floor"]) for first, *_ in targets.values() if first is not None), [])
    rows = []
    for variant, seen in of_variant.items():
        found = targets[variant]
        divergence = ["none" for _ in DIVERGENCES]  # a sampler without noise
        if all(each["divergence"] is not None for each in seen):
            divergence = [
                _cell(Spread.of([each["divergence"][name] for each in seen])) for name in DIVERGENCES.values()
            ]
        if found[0] is None:  # so for all seeds, which have the same λ
            rows.append([variant, "none for its λ", "", *divergence, *("" for _ in names)])
            continue
        numbers = [_cell(Spread.of([target[name] for target in found])) for name in ("beta", "ess")]
        rows.append([variant, *numbers, *divergence, *(_gap(name, found) for name in names)])
    prompts = "training prompts" if group == "trained" else "held-out prompts"
    title = (
        f"Distances from the tilted target, {prompts}: pretrained → finetuned (finite-sample floor), means over seeds"
    )
    return Sheet(title, ["method", "β", "effective samples", *DIVERGENCES, *names], rows)


def _gap(name: str, targets: Sequence[dict[str, Any]]) -> str:
    before, after, floor = (
        fmean(target[of][name] for target in targets) for of in ("pretrained", "finetuned", "floor")
    )
    return f"{before:.3g} → {after:.3g} ({floor:.2g})"


def _variants(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.variant for point in points))


def _sheet(title: str, means: dict[str, Mean], samples: int) -> Sheet:
    columns = {
        name: [_cell(mean.metrics[name]) for mean in means.values()]
        for name in METRICS
        if all(name in mean.metrics for mean in means.values())
    }
    if "hue_entropy" in columns and samples > 1:
        ceiling = hue_entropy_ceiling(samples)
        shares = [mean.metrics["hue_entropy"].times(100 / ceiling) for mean in means.values()]
        label = f"hue_entropy, % of its ceiling for {samples} samples a prompt, {ceiling:.3f}"
        columns[label] = [_cell(share, places=1) for share in shares]
    columns |= {name: [_cell(getattr(mean, name), places=0) for mean in means.values()] for name in SPENT}
    return Sheet(title, ["method", *columns], list(zip(means, *columns.values(), strict=True)))


def _cell(spread: Spread, places: int | None = None) -> str:
    """The mean, followed by the lowest and the highest value if seeds differ, and the number of seeds without a finite value."""
    if math.isnan(spread.mean):
        return "not finite"
    texts = [
        f"{value:.4g}" if places is None else f"{value:,.{places}f}" for value in (spread.mean, spread.low, spread.high)
    ]
    mean, low, high = texts
    cell = mean if low == high else f"{mean} [{low}, {high}]"
    return f"{cell}, {spread.left_out} not finite" if spread.left_out else cell
