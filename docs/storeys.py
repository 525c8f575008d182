"""Draws `docs/storeys.png`, the storeys of the package, from the list in `tests/test_storeys.py`: `python -m docs.storeys`."""

import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastnabla.utils.console import quiet_libraries
from tests.test_storeys import PICTURE, STOREYS, in_words

quiet_libraries()

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

COMMANDS, RUNS, PARTS, GROUND, PAPER = "#d9d7f1", "#cfe3f5", "#d3ecd2", "#e6e6e6", "#fbe3c0"
EDGES = {COMMANDS: "#7a74c4", RUNS: "#4a86bd", PARTS: "#4f9a4d", GROUND: "#8a8a8a", PAPER: "#cf8a22"}
SUBJECTS = (
    (COMMANDS, "command lines"),
    (COMMANDS, "methods tuned alike, then measured with fresh seeds"),
    (COMMANDS, "several methods with one budget; Gaussian mixtures"),
    (RUNS, "a finished run against p_ref · exp(β r)"),
    (RUNS, "build.py wires the parts; trainer.py is the loop"),
    (RUNS, "traces what is not finite"),
    (RUNS, "a run's files: checkpoints, metrics, lock, pictures"),
    (RUNS, "passes, bytes and the memory plan"),
    (PARTS, "network passes of an update: nabla_db.py and baselines"),
    (PARTS, "reward, diversity, distance from the prior"),
    (PARTS, "rollout, buffer, draws of steps"),
    (PARTS, "optimizer, average of the weights"),
    (PARTS, "policy, LoRA, flow network, decoder"),
    (PARTS, "what is rewarded, and for which prompt"),
    (GROUND, "processes, devices, sharding"),
    (GROUND, "the embedded model and its data"),
    (GROUND, "settings of a run; imports neither torch nor diffusers"),
    (PAPER, "the loss for other training loops; the table in diffusers"),
    (PAPER, "the paper's maths, in plain torch and fused"),
    (PAPER, "Triton kernels"),
    (PAPER, "a sampler as a table with one row per step"),
    (PAPER, "coefficients of diffusers' schedulers"),
    (GROUND, "seeds, durable files, messages"),
)
METHOD = ("training", "methods", "objective", "transition")
"""Storeys with a bold frame."""
WIDTH, HEIGHT = 9.6, 0.36
"""Of a storey, in inches."""


def draw(path: Path) -> None:
    """Draw the picture; its text chunk "storeys" says what it shows."""
    top = HEIGHT * len(STOREYS)
    figure = Figure(figsize=(WIDTH, top + 0.1), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(-0.05, top + 0.05))
    axes.axis("off")
    for i, (names, (colour, subject)) in enumerate(zip(STOREYS, SUBJECTS, strict=True)):
        y, bold = top - HEIGHT * (i + 1), names[0] in METHOD
        box = FancyBboxPatch((0.06, y + 0.04), WIDTH - 0.12, HEIGHT - 0.07, boxstyle="round,pad=0,rounding_size=0.06")
        box.set(facecolor=colour, edgecolor=EDGES[colour], linewidth=2.2 if bold else 0.8)
        axes.add_patch(box)
        text = dict(y=y + HEIGHT / 2, va="center", color="#1a1a1a")
        weight = "bold" if bold else "normal"
        axes.text(0.22, s="  ".join(names), family="DejaVu Sans Mono", fontsize=10.5, weight=weight, **text)
        axes.text(4.9, s=subject, family="DejaVu Sans", fontsize=9.5, **text)
    drawn = io.BytesIO()
    figure.savefig(drawn, transparent=True)
    shown = PngInfo()
    shown.add_text("storeys", in_words(STOREYS))
    image = Image.open(drawn).quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(path, optimize=True, pnginfo=shown)


if __name__ == "__main__":
    draw(PICTURE)
