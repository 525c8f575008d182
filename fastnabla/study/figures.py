"""The picture of a study: each method's front, with seeds as points."""

import io
import itertools
from statistics import fmean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastnabla.study.fronts import Place
from fastnabla.study.measures import MEASURES
from fastnabla.study.plan import Setting
from fastnabla.study.results import Results

SHOWN = ("hue_entropy", "joint_entropy", "kernel_distance", "kernel_distance_pixels")
"""Measures plotted against the gain of the reward, if available."""
COLOURS = colormaps["tab20"].colors
LINES = ("-", "--", ":", "-.")
"""Line styles of a method's settings."""


def fronts(results: Results) -> bytes:
    """A PNG file: measures against the change of the reward.

    A line is the mean over seeds as the LoRA is scaled; its dots are the seeds' end points, at scale 1.
    """
    names = [name for name in SHOWN if all(name in run.end for run in results.runs)]
    figure = Figure(figsize=(13, 4.6 * ((len(names) + 1) // 2) + 0.9), layout="constrained")
    axes = figure.subplots((len(names) + 1) // 2, 2, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        _front(axis, results, name)
    for axis in axes[len(names) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _front(axis: Axes, results: Results, name: str) -> None:
    for number, method in enumerate(results.protocol.methods):
        for style, setting in zip(itertools.cycle(LINES), results.settings_of(method.name), strict=False):
            look = {"color": COLOURS[number % len(COLOURS)]}
            x, y = _mean_path(results, setting, name)
            axis.plot(x, y, linewidth=1.2, linestyle=style, label=str(setting), alpha=0.8, **look)
            ends = [_at_one(run.path) for run in results.of(setting).values()]
            starts = [run.path[0] for run in results.of(setting).values()]
            gains = [e.measures["reward"] - s.measures["reward"] for e, s in zip(ends, starts, strict=True)]
            axis.scatter(gains, [end.measures[name] for end in ends], s=14, zorder=3, **look)
    start = fmean(run.path[0].measures[name] for run in results.runs)
    axis.scatter([0], [start], marker="*", s=170, color="black", label="pretrained", zorder=4)
    axis.set_xlabel("change of mean reward")
    better = {1: " (higher is better)", -1: " (lower is better)", 0: ""}[MEASURES[name].sign]
    axis.set_ylabel(f"{MEASURES[name].label}{better}")
    axis.grid(alpha=0.3)


def _mean_path(results: Results, setting: Setting, name: str) -> tuple[list[float], list[float]]:
    """Gain and measure by scale, means over seeds."""
    paths = [run.path for run in results.of(setting).values()]
    x, y = [], []
    for places in zip(*paths, strict=True):
        gains = [p.measures["reward"] - path[0].measures["reward"] for p, path in zip(places, paths, strict=True)]
        x.append(fmean(gains))
        y.append(fmean(place.measures[name] for place in places))
    return x, y


def _at_one(path: list[Place]) -> Place:
    return next(place for place in path if place.scale == 1)
