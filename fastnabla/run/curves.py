"""The curves of a run's metrics, one panel per subject."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a dry run does not need matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "reward": ("evaluate", ("reward", "ema_reward"), "mean reward"),
    "diversity": ("evaluate", ("hue_entropy", "pairwise_distance"), "relative to the pretrained model"),
    "distance from the prior": ("evaluate", ("prior_distance",), "Fréchet distance, probe features"),
    "losses": (
        "train",
        (
            "loss_forward",
            "loss_reverse",
            "loss_terminal",
            "loss_balance",
            "loss_trust_region",
            "loss_surrogate",
            "loss_reward",
            "loss_kl",
        ),
        "weighted, per element",
    ),
    "score norms": ("train", ("norm_ref", "norm_residual", "norm_reward", "norm_target"), "mean over transitions"),
    "gradient norms": ("train", ("grad_norm_lora", "grad_norm_flow"), "before clipping"),
}
"""Title → (phase, metrics, label of the y axis)."""
DECADES, LABELLED_DECADES = 4, 3
"""The most decades that a panel shows, and up to which 2 and 5 of each decade are labelled too."""
FEW = 30
"""Up to so many updates are marked by dots."""

Line = tuple[list[int], list[float]]
"""Updates and values. NaN leaves a gap."""


def curves(records: Sequence[dict[str, Any]]) -> "Figure":
    """Draw the panels of `CURVES` for which the run's metric records have values."""
    from matplotlib.figure import Figure

    found = _found(records)
    panels = {title: lines for title in CURVES if (lines := _lines(title, found))}
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(13 / 3 * columns, 3.25 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, lines)
        if title == "reward":
            _shade_deviation(axis, found)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return figure


def _found(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Line]:
    """The lines of all metrics of `CURVES`, and of the rewards' deviation: (phase, metric) → line, by update."""
    drawn: dict[str, list[str]] = {"evaluate": ["reward_std"]}
    for phase, names, _ in CURVES.values():
        drawn.setdefault(phase, []).extend(names)
    found: dict[tuple[str, str], Line] = {}
    for record in records:  # once: each record may be made as it is read
        for name in drawn.get(record["phase"], ()):
            if name in record:
                updates, values = found.setdefault((record["phase"], name), ([], []))
                updates.append(record["update"])
                values.append(math.nan if record[name] is None else record[name])
    return {key: _by_update(*line) for key, line in found.items()}


def _by_update(updates: list[int], values: list[float]) -> Line:
    order = sorted(range(len(updates)), key=updates.__getitem__)
    return [updates[i] for i in order], [values[i] for i in order]


def _lines(title: str, found: dict[tuple[str, str], Line]) -> dict[str, Line]:
    """The lines of a panel: metric → line. Metrics without a finite value are left out."""
    lines, (phase, names, _) = {}, CURVES[title]
    for name in names:
        updates, values = found.get((phase, name), ([], []))
        if title == "diversity" and values:
            values = [value / values[0] if values[0] else math.nan for value in values]
        if any(map(math.isfinite, values)):
            lines[name] = updates, values
    return lines


def _panel(axis: "Axes", title: str, lines: dict[str, Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    phase, _, label = CURVES[title]
    finite = [value for _, values in lines.values() for value in values if math.isfinite(value)]
    for name, (updates, values) in lines.items():
        marker = "o" if phase == "evaluate" else "." if len(updates) <= FEW else None
        axis.plot(updates, values, marker=marker, label=name.removeprefix("loss_"))
    last = max(1, *(update for updates, _ in lines.values() for update in updates))
    axis.set_xlim(-0.03 * last, 1.03 * last)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
    if title == "diversity":
        axis.set_ylim(0, 1.1 * max(finite))
    if phase == "train":
        _scale(axis, finite)
    axis.set_title(title)
    axis.set_xlabel("updates")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _scale(axis: "Axes", values: Sequence[float]) -> None:
    """Make the y axis logarithmic, down to 0, if the values span at least a decade and none is negative."""
    from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator

    positive = [value for value in values if value > 0]
    if min(values) < 0 or not positive or max(positive) < 10 * min(positive):
        return
    top = math.ceil(math.log10(max(positive)))
    bottom = max(math.floor(math.log10(min(positive))), top - DECADES)
    axis.set_yscale("symlog", linthresh=10.0**bottom)
    if top - bottom <= LABELLED_DECADES:
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=10.0**bottom, subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_ylim(0 if min(values) < 10.0**bottom else min(values) / 1.2, max(values) * 1.2)


def _shade_deviation(axis: "Axes", found: dict[tuple[str, str], Line]) -> None:
    """Shade one standard deviation of the images' rewards around the mean."""
    updates, means = found["evaluate", "reward"]
    deviations = found.get(("evaluate", "reward_std"), ([], []))[1]
    if len(deviations) == len(means):
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axis.fill_between(updates, low, high, alpha=0.15)
