"""The plots of a comparison, as PNG files."""

import dataclasses
import io
import itertools
import math
from collections.abc import Collection, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fastnabla.comparison.points import Point
from fastnabla.comparison.summary import Mean, Spread, along_training, changes, front
from fastnabla.config.methods import METHODS

COLOURS = (*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2])
"""Ten dark colours, then their light shades. Variants have them in turn, but for those of methods in the plot."""
METHOD_COLOURS = dict(zip(METHODS, COLOURS[: len(METHODS)], strict=True))
"""Method → colour, the same in all plots."""
LEGEND_WIDTH, KEY_WIDTH = 150, 6
"""Width of a legend line and of a legend key, in characters."""
LEGEND_LINE = 0.2
"""Height of a legend line, in inches."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """A metric plotted against the reward."""

    name: str
    """Name of the metric."""
    label: str
    sign: int
    """1 if higher is better, −1 if lower is better."""


MEASURES = (
    Measure("pairwise_distance", "change of pairwise distance (higher is better)", 1),
    Measure("hue_entropy", "change of hue entropy (higher is better)", 1),
    Measure("prior_distance", "change of prior distance (lower is better)", -1),
)


def reward_curves(points: Sequence[Point]) -> bytes:
    """Plot the change of the reward against updates and against network passes.

    Lines are means over seeds; shaded areas span the lowest to the highest seed.
    """
    lines = _by_variant(points)
    colours = _colours(lines)
    figure = Figure(figsize=(11, 4 + _legend_height(lines)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, field, label in zip(axes, ("updates", "passes"), ("updates", "network passes, U"), strict=True):
        for variant, means in lines.items():
            x = [getattr(mean, field).mean for mean in means]
            rewards = [mean.metrics["reward"] for mean in means]
            axis.plot(x, [r.mean for r in rewards], marker="o", markersize=4, color=colours[variant], label=variant)
            low, high = [r.low for r in rewards], [r.high for r in rewards]
            axis.fill_between(x, low, high, color=colours[variant], alpha=0.15, linewidth=0)
        axis.axhline(0, color="black", linestyle=":", linewidth=1, label="pretrained")
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("change of mean reward")
    _legend(figure, axes[0])
    return _png(figure)


def fronts(points: Sequence[Point]) -> bytes | None:
    """Plot the change of each available metric of `MEASURES` against the change of the reward. None if none is available.

    Points are means over seeds, and bars span the lowest to the highest seed. Points on the Pareto front have a black edge
    and are joined. Points that are not finite are left out.
    """
    lines = _by_variant(points)
    measures = [m for m in MEASURES if all(m.name in mean.metrics for line in lines.values() for mean in line)]
    if not measures:
        return None
    size = (0.6 + 4.6 * len(measures), 4.6 + _legend_height(lines))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False)
    for axis, measure in zip(axes[0], measures, strict=True):
        _front(axis, measure, lines)
    _legend(figure, axes[0][0])
    return _png(figure)


def _front(axis: Axes, measure: Measure, lines: dict[str, list[Mean]]) -> None:
    colours, places, edged = _colours(lines), [(0.0, 0.0)], ["black"]
    for variant, line in lines.items():
        spreads = [(mean.metrics["reward"], mean.metrics[measure.name]) for mean in line]
        x, y = zip(*((reward.mean, value.mean) for reward, value in spreads), strict=True)
        axis.plot(x, y, color=colours[variant], linewidth=1, alpha=0.6)
        if any(reward.low < reward.high for reward, _ in spreads):
            bars = {"xerr": _bars([r for r, _ in spreads]), "yerr": _bars([v for _, v in spreads])}
            axis.errorbar(x, y, **bars, fmt="none", ecolor=colours[variant], elinewidth=0.8, alpha=0.4)
        axis.scatter(x[1:], y[1:], s=26, color=colours[variant], label=variant, zorder=3)
        finite = [place for place in zip(x[1:], y[1:], strict=True) if all(map(math.isfinite, place))]
        places += finite
        edged += [colours[variant]] * len(finite)
    # The Pareto front, which may include the pretrained model.
    best = sorted(front([(x, measure.sign * y) for x, y in places]), key=lambda i: places[i])
    x, y = zip(*(places[i] for i in best), strict=True)
    axis.plot(x, y, color="black", linewidth=0.8, linestyle="--", alpha=0.5)
    axis.scatter(x, y, s=46, color=[edged[i] for i in best], edgecolors="black", linewidths=1.2, zorder=4)
    axis.scatter(*places[0], marker="*", s=170, color="black", label="pretrained", zorder=5)
    axis.set_xlabel("change of mean reward")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.set_ylabel(measure.label)
    axis.grid(alpha=0.3)


def _by_variant(points: Sequence[Point]) -> dict[str, list[Mean]]:
    points = changes(points)
    return {variant: along_training(points, variant) for variant in dict.fromkeys(point.variant for point in points)}


def _colours(variants: Collection[str]) -> dict[str, tuple[float, ...]]:
    of_methods = {variant: METHOD_COLOURS[variant] for variant in variants if variant in METHOD_COLOURS}
    others = itertools.cycle(colour for colour in COLOURS if colour not in of_methods.values())
    return {variant: of_methods.get(variant) or next(others) for variant in variants}


def _bars(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]]


def _legend_columns(labels: Collection[str]) -> int:
    return max(1, min(len(labels), LEGEND_WIDTH // (KEY_WIDTH + max(map(len, labels)))))


def _legend_height(variants: Collection[str]) -> float:
    return LEGEND_LINE * math.ceil((len(variants) + 1) / _legend_columns(variants))


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = _legend_columns(labels)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9, frameon=False)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
