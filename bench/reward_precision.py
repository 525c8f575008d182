"""Measures how much the published rewards' scores and image gradients change in TF32 and bfloat16, relative to float32.

    python -m bench.reward_precision [--rewards NAME…] [--images N]

Runs on a CPU, with full-size architectures and random weights (seed 0). bfloat16 is what the rewards use. TF32 is emulated:
both inputs of every matrix product and convolution are rounded to 10 bits of mantissa, forward and backward, and summed in
float32. The images are smooth random images with noise, all with the same prompt. A score's deviation is in units of the
standard deviation of the float32 scores over the images; a deviation of 1 would hide the differences between images.
"""

import dataclasses
import gc
import platform
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastnabla.config.model_sections import Precision
from fastnabla.rewards import PUBLISHED, RewardOptions, published_class
from fastnabla.rewards.__main__ import sample_images
from fastnabla.rewards.inspection import value_and_gradient
from fastnabla.rewards.model import RewardModel

PIXELS = 512
PROMPT = "a photo of an astronaut riding a horse on the moon"
PRODUCTS = {
    getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
}


def to_tf32(x: Tensor) -> Tensor:
    """The float32 `x` rounded to 10 bits of mantissa, to nearest, ties away from zero (PTX `cvt.rna.tf32`)."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class EmulatedTF32(TorchDispatchMode):
    """Rounds the inputs of matrix products and convolutions, also in backward passes. Attention is only seen if it is written
    as matrix products (`attn_implementation="eager"`)."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if operation.overloadpacket in PRODUCTS:
            self.rounded += 1
            args = tree_map_only(Tensor, lambda x: to_tf32(x) if x.ndim > 1 else x, args)  # biases are not rounded
        return operation(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Deviations of one reward in one precision, over the images."""

    reward: str
    precision: str
    spread: float
    """Standard deviation of the float32 scores."""
    score_mean: float
    score_max: float
    """Mean and maximum of the score's absolute deviation, in units of `spread`."""
    gradient_mean: float
    gradient_max: float
    """Mean and maximum of the norm of an image gradient's deviation, relative to the gradient's norm."""
    cosine_min: float
    """Smallest cosine between an image's gradient and the float32 one."""


def row_of(name: str, precision: str, values: Tensor, gradient: Tensor, exact: tuple[Tensor, Tensor]) -> Row:
    wanted, wanted_gradient = (x.double().flatten(1) if x.ndim > 1 else x.double() for x in exact)
    gradient, spread = gradient.double().flatten(1), wanted.std().item()
    score = (values.double() - wanted).abs() / spread
    apart = (gradient - wanted_gradient).norm(dim=1) / wanted_gradient.norm(dim=1)
    cosine = F.cosine_similarity(gradient, wanted_gradient).min().item()
    numbers = (score.mean(), score.max(), apart.mean(), apart.max())
    return Row(name, precision, spread, *(number.item() for number in numbers), cosine)


def one_by_one(reward: RewardModel, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    found = [value_and_gradient(reward, images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))]
    return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])


def measure(name: str, images: Tensor) -> list[Row]:
    """Rows of the reward `name` for emulated TF32 and bfloat16."""
    prompts = [PROMPT] * len(images)

    def build(precision: Precision) -> RewardModel:
        return published_class(name).random_init(torch.device("cpu"), RewardOptions(precision=precision))

    reward = build("float32")
    exact = one_by_one(reward, images, prompts)
    for module in reward.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "eager"
    with EmulatedTF32() as emulated:
        tf32 = one_by_one(reward, images, prompts)
    assert emulated.rounded > len(images), "the emulation saw no matrix product"
    del reward
    gc.collect()
    bf16 = one_by_one(build("bf16"), images, prompts)
    return [row_of(name, "tf32, emulated", *tf32, exact), row_of(name, "bf16", *bf16, exact)]


def markdown(rows: list[Row]) -> str:
    lines = [
        "| reward | precision | score: mean, max, of the spread | spread | gradient: mean, max, relative | min cosine |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = (f"`{r.reward}`", r.precision, f"{r.score_mean:.2g}, {r.score_max:.2g}", f"{r.spread:.2g}")
        cells += (f"{r.gradient_mean:.2g}, {r.gradient_max:.2g}", f"{r.cosine_min:.6f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(rewards: tuple[str, ...] = tuple(PUBLISHED), images: int = 8) -> None:
    """Print the table.

    Args:
        rewards: names of published rewards.
        images: number of images, at least 2.
    """
    if images < 2:
        raise SystemExit(f"images = {images}: a score's spread needs at least 2")
    pictures = sample_images(None, images, PIXELS)
    print(f"{images} images of {PIXELS} × {PIXELS}, on {platform.machine()}, torch {torch.__version__}\n")
    print(markdown([row for name in rewards for row in measure(name, pictures)]))


if __name__ == "__main__":
    tyro.cli(main)
