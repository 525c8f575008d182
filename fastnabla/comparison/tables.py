"""The tables of a comparison."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fastnabla.comparison.points import Point
from fastnabla.comparison.summary import Mean, Spread, common_rewards, last, matched, pretrained

METRICS = ("reward", "pairwise_distance", "hue_entropy", "vendi", "prior_distance", "dark_grounds", "accuracy")
"""Metrics shown as columns, if available."""
SPENT = ("updates", "passes", "transitions", "seconds")


@dataclasses.dataclass(frozen=True, slots=True)
class Sheet:
    """A table of strings."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, below its title."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return f"{self.title}\n\n" + "".join("| " + " | ".join(map(_markdown_cell, line)) + " |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def final_sheet(points: Sequence[Point]) -> Sheet:
    """The pretrained model, and each variant at the end of training."""
    means = {variant: last(points, variant) for variant in _variants(points)}
    return _sheet("At the end of training", {"pretrained": pretrained(points), **means})


def matched_sheet(points: Sequence[Point]) -> Sheet:
    """The pretrained model, and each variant at the evaluation nearest to the highest reward that all methods reach."""
    nearest, reward = matched(points), _cell(Spread.of(list(common_rewards(points).values())))
    means = {variant: Mean.of([p for p in nearest if p.variant == variant]) for variant in _variants(points)}
    title = f"At the evaluation nearest to the highest reward that every method reaches, {reward}"
    return _sheet(title, {"pretrained": pretrained(points), **means})


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
        divergence = _cell(Spread.of([each["divergence"]["nats"] for each in seen]))
        if found[0] is None:  # so for all seeds, which have the same λ
            rows.append([variant, "none: λ = 0", "", divergence, *("" for _ in names)])
            continue
        numbers = [_cell(Spread.of([target[name] for target in found])) for name in ("beta", "ess")]
        rows.append([variant, *numbers, divergence, *(_gap(name, found) for name in names)])
    prompts = "training prompts" if group == "trained" else "held-out prompts"
    title = (
        f"Distances from the tilted target, {prompts}: pretrained → finetuned (finite-sample floor), means over seeds"
    )
    return Sheet(title, ["method", "β", "effective samples", "KL along trajectories, nats", *names], rows)


def _gap(name: str, targets: Sequence[dict[str, Any]]) -> str:
    before, after, floor = (
        fmean(target[of][name] for target in targets) for of in ("pretrained", "finetuned", "floor")
    )
    return f"{before:.3g} → {after:.3g} ({floor:.2g})"


def _variants(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.variant for point in points))


def _sheet(title: str, means: dict[str, Mean]) -> Sheet:
    names = [name for name in METRICS if all(name in mean.metrics for mean in means.values())]
    rows = [
        [
            label,
            *(_cell(mean.metrics[name]) for name in names),
            *(_cell(getattr(mean, name), places=0) for name in SPENT),
        ]
        for label, mean in means.items()
    ]
    return Sheet(title, ["method", *names, *SPENT], rows)


def _cell(spread: Spread, places: int | None = None) -> str:
    """The mean, followed by the lowest and the highest value if seeds differ."""
    texts = [f"{value:.4g}" if places is None else f"{value:,.{places}f}" for value in dataclasses.astuple(spread)]
    mean, low, high = texts
    return mean if low == high else f"{mean} [{low}, {high}]"
