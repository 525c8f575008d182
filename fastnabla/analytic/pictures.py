"""Plots of an analytic run: samples and the exact target, and the distance between them during training."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastnabla.analytic.experiment import Experiment
from fastnabla.analytic.measures import floors
from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.utils.seeding import generator_of

LABELS = {"mode_mass_error": "mode-mass error", "sliced_wasserstein": "sliced Wasserstein distance"}
COLUMNS = 3


def save_pictures(
    run: Path, experiment: Experiment, before: Tensor, after: Tensor, records: Sequence[dict[str, Any]]
) -> None:
    """Write `samples.png` and `curves.png` into the folder `run`, from samples `[N, D]` and the metric records."""
    save_histograms(run / "samples.png", {"pretrained": before, "finetuned": after}, experiment.target)

    floor = floors(experiment.target, len(before))
    evaluations = [record for record in records if record["phase"] == "evaluate"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (name, label) in zip(axes, LABELS.items(), strict=True):
        axis.plot([r["update"] for r in evaluations], [r[name] for r in evaluations], marker="o", label="finetuned")
        axis.axhline(floor[name], linestyle="--", color="grey", label="Monte-Carlo floor")
        axis.set(xlabel="updates", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(run / "curves.png", dpi=100)


def save_histograms(path: Path, samples: dict[str, Tensor], target: GaussianMixture) -> None:
    """Plot 2-D histograms of `samples`, title → `[N, D]`, and of as many exact draws from `target`, `COLUMNS` per row."""
    count = len(next(iter(samples.values())))
    exact = target.sample(count, generator_of(0, "evaluation", 0))
    panels = samples | {"exact target": exact}
    plane, rows = widest_plane(target), math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(10 / 3 * COLUMNS, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True)
    edges = [torch.linspace(low, high, 61).numpy() for low, high in (_range(exact @ plane[:, i]) for i in range(2))]
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        x, y = (points @ plane).T.numpy()
        axis.hist2d(x, y, bins=edges, cmap="Blues", vmin=0, vmax=count / 150)
        axis.set_title(title)
        axis.set_aspect("equal")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=100 if rows == 1 else 60)


def widest_plane(mixture: GaussianMixture) -> Tensor:
    """Two orthonormal directions `[D, 2]` along which the modes vary most; the axes if D is 2."""
    if mixture.dimension == 2:
        return torch.eye(2, dtype=torch.float64)
    return torch.linalg.svd(mixture.means - mixture.means.mean(0)).Vh[:2].T


def _range(values: Tensor) -> tuple[float, float]:
    """The range of 99% of `values`, with a margin."""
    low, high = values.quantile(0.005).item(), values.quantile(0.995).item()
    return low - 0.3 * (high - low), high + 0.3 * (high - low)
