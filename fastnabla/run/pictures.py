"""Pictures of a run: grids of samples before and after training, and curves of its metrics."""

import gc
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastnabla.utils.printable import printable

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
        ),
        "weighted, per element",
    ),
    "score norms": ("train", ("norm_ref", "norm_residual", "norm_reward", "norm_target"), "mean over transitions"),
    "gradient norms": ("train", ("grad_norm_lora", "grad_norm_flow"), "before clipping"),
}
"""Title → (phase, metrics, label of the y axis)."""


def save_pictures(
    run: Path, records: Sequence[dict[str, Any]], columns: dict[str, Tensor], prompts: Sequence[str]
) -> None:
    """Write an evaluation's sample grid, samples/update-0010.png, and the run's curves, curves.png.

    Args:
        run: folder to write into.
        records: the run's metric records; the last is the evaluation's.
        columns, prompts: see `save_grid`.
    """
    (run / "samples").mkdir(exist_ok=True)
    save_grid(run / "samples" / f"update-{records[-1]['update']:04d}.png", columns, prompts)
    save_curves(run / "curves.png", records)


def _pyplot() -> Any:
    """matplotlib's pyplot without a display. It is imported here because a dry run does not need it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a box is drawn instead
        figure.savefig(path, dpi=110, format="png")
    _pyplot().close(figure)
    gc.collect()  # figures are reference cycles of several MB; Python would let about ten of them pile up


def montage(images: Tensor, rows: int) -> Tensor:
    """Arrange images `[N, 3, H, W]` row by row as one picture, about `[rows * H, N / rows * W, 3]`, a pixel apart."""
    images = images.clamp(0, 1)
    _, channels, height, width = images.shape
    padded = images.new_ones(len(images), channels, height + 1, width + 1)
    padded[..., :height, :width] = images
    grid = padded.view(rows, -1, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * (height + 1), -1, channels)[:-1, :-1]


def save_grid(path: Path, columns: dict[str, Tensor], prompts: Sequence[str], per_prompt: int = 8) -> None:
    """Write sample grids side by side, with one row per prompt.

    Args:
        path: PNG to write.
        columns: title → images `[P * n, 3, H, W]`, prompt by prompt.
        prompts: P texts.
        per_prompt: maximum number of images shown for each prompt.
    """
    count = len(prompts)
    columns = {title: images.unflatten(0, (count, -1))[:, :per_prompt] for title, images in columns.items()}
    width = sum(images.shape[1] * images.shape[-1] / images.shape[-2] for images in columns.values())
    labels = [label if len(label) < 40 else label[:37] + "…" for label in map(printable, prompts)]
    figure, axes = _pyplot().subplots(
        1,
        len(columns),
        figsize=(0.5 + 0.07 * max(map(len, labels)) + 0.58 * width, 0.58 * count + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, images) in zip(axes[0], columns.items(), strict=True):
        axis.imshow(montage(images.flatten(0, 1), count).cpu().numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        side = images.shape[-2] + 1
        axis.set_yticks([side * (i + 0.5) for i in range(count)] if axis is axes[0][0] else [])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    axes[0][0].set_yticklabels(labels, fontsize=8, parse_math=False)
    _save(figure, path)


def _number(record: dict[str, Any], name: str) -> float:
    """A metric of a record. NaN, which leaves a gap in a curve, if it is missing or None."""
    value = record.get(name)
    return math.nan if value is None else value


def save_curves(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Draw the run's `CURVES` from its metric records."""
    figure, axes = _pyplot().subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, (phase, names, label)) in zip(axes.flat, CURVES.items(), strict=True):
        for name in names:
            own = sorted((r for r in records if r["phase"] == phase and name in r), key=lambda r: r["update"])
            updates, values = [r["update"] for r in own], [_number(r, name) for r in own]
            if not own or (title == "diversity" and not abs(values[0]) > 0):
                continue
            if title == "diversity":
                values = [value / values[0] for value in values]
            axis.plot(updates, values, marker="o" if phase == "evaluate" else None, label=name.removeprefix("loss_"))
            if name == "reward":
                spread = [_number(r, "reward_std") for r in own]
                axis.fill_between(
                    updates,
                    [v - s for v, s in zip(values, spread, strict=True)],
                    [v + s for v, s in zip(values, spread, strict=True)],
                    alpha=0.15,
                )
        if phase == "train":
            axis.set_yscale("symlog", linthresh=1e-4)
        if title == "diversity":
            axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.set_xlabel("updates")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    _save(figure, path)
