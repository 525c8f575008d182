"""The pictures of a study: each method's front, with seeds as points."""

import io
import itertools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from fastnabla.study.measures import MEASURES
from fastnabla.study.plan import Setting
from fastnabla.study.results import Results

COLUMNS = 4
LOOKS = (("tab:blue", "o"), ("tab:orange", "^"), ("tab:green", "s"), ("tab:red", "D"))
"""Colours and markers of a method's settings."""
Front = dict[float, tuple[float, ...]]
"""Scale of the LoRA → changes of the reward and of a measure from the pretrained model."""


def fronts(results: Results, name: str) -> bytes:
    """A PNG file: the change of a measure against that of the reward, from the same seed's pretrained model.

    A panel for each method that has been measured. Lines are means over seeds as the LoRA is scaled, dotted beyond scale 1. Dots are
    the seeds' end points, at scale 1, by learning rate. The other methods are grey, and that of the claims is black.

    Args:
        results: with at least one run.
        name: of the measure.
    """
    shown = [method.name for method in results.protocol.methods if results.settings_of(method.name)]
    rows = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, method in zip(axes, shown, strict=False):
        _panel(axis, results, name, method, shown)
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis in axes[max(0, len(shown) - COLUMNS) : len(shown)]:
        axis.tick_params(labelbottom=True)
    if MEASURES[name].sign < 0:  # distances, which differ by orders of magnitude
        axes[0].set_yscale("symlog", linthresh=10)
        axes[0].yaxis.set_major_formatter(ScalarFormatter())
    better = {1: ", higher is better", -1: ", lower is better", 0: ""}[MEASURES[name].sign]
    figure.supxlabel("change of mean reward", fontsize=10)
    figure.supylabel(f"change of {MEASURES[name].label}{better}", fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _panel(axis: Axes, results: Results, name: str, method: str, shown: Sequence[str]) -> None:
    claims = results.protocol.claims
    for other in shown:
        colour, width, above = ("black", 1.0, 2) if other == claims.method else ("lightgrey", 0.8, 1)
        for setting in results.settings_of(other) if other != method else ():
            _draw_mean(axis, _fronts(results, setting, name), color=colour, linewidth=width, zorder=above)
    for (colour, marker), setting in zip(itertools.cycle(LOOKS), results.settings_of(method), strict=False):
        own = _fronts(results, setting, name)
        _draw_mean(axis, own, color=colour, linewidth=1.8, zorder=3)
        ends = [front[1.0] for front in own]
        axis.scatter(
            *zip(*ends, strict=True), s=16, marker=marker, color=colour, zorder=4, label=f"{setting.learning_rate:g}"
        )
    axis.axvline(claims.gain, color="grey", linewidth=0.6, zorder=0)
    axis.scatter([0], [0], marker="*", s=110, color="black", zorder=5)
    axis.set_title(method, fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    # Above the panel, where it hides no point.
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(LOOKS),
        fontsize=8,
        frameon=False,
        borderaxespad=0,
        handletextpad=0,
        columnspacing=0.6,
    )


def _fronts(results: Results, setting: Setting, name: str) -> list[Front]:
    """Of each seed."""
    return [
        {
            place.scale: tuple(place.measures[of] - run.path[0].measures[of] for of in ("reward", name))
            for place in run.path
        }
        for run in results.of(setting).values()
    ]


def _draw_mean(axis: Axes, seeds: Sequence[Front], **look: Any) -> None:
    """Draw the mean over seeds, dotted beyond scale 1."""
    mean = {scale: [fmean(each) for each in zip(*(front[scale] for front in seeds), strict=True)] for scale in seeds[0]}
    for line, scales in (
        ("-", [scale for scale in mean if scale <= 1]),
        (":", [scale for scale in mean if scale >= 1]),
    ):
        axis.plot(*zip(*(mean[scale] for scale in scales), strict=True), linestyle=line, **look)
