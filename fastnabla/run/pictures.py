"""Pictures of a run: grids of samples before and after training, and curves of its metrics."""

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastnabla.run.curves import curves
from fastnabla.utils.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def save_curves(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Draw a run's metric records: see `fastnabla.run.curves.curves`."""
    _save(curves(records), path)


def _save(figure: "Figure", path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a box is drawn instead
        figure.savefig(path, dpi=110, format="png")
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
    from matplotlib.figure import Figure  # not needed by a dry run

    count = len(prompts)
    columns = {title: images.unflatten(0, (count, -1))[:, :per_prompt] for title, images in columns.items()}
    width = sum(images.shape[1] * images.shape[-1] / images.shape[-2] for images in columns.values())
    labels = [label if len(label) < 40 else label[:37] + "…" for label in map(printable, prompts)]
    size = (0.5 + 0.07 * max(map(len, labels)) + 0.58 * width, 0.58 * count + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)
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
