"""The testbed's data: silhouettes of ten animals, tinted with random hues.

10,000 grey masks of 28x28 pixels (MIT, see `data/LICENSE.animal_mnist.txt`) become 32x32 colour
images. The animal is what a prompt names; hue, ground, pose and size are left free, so a finetuned
model that loses its diversity shows it in plain sight.

Splits, by position modulo 10: 0 is the *test* split, on which nothing is ever trained; the generator
learns from all others, the reward's classifier from 1-4 and the evaluation's classifier from 5-9, so
that a sample that fools the reward does not thereby fool the evaluation.
"""

from functools import cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 32
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
SPLITS = {
    "test": (0,),
    "generator": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "reward": (1, 2, 3, 4),
    "evaluation": (5, 6, 7, 8, 9),
}
PHRASINGS = ("{a} {animal}", "a picture of {a} {animal}", "the silhouette of {a} {animal}")


def caption(animal: str, phrasing: int = 0) -> str:
    """The prompt that names `animal`, in one of the `PHRASINGS`: ``"an elephant"``."""
    return PHRASINGS[phrasing].format(a="an" if animal[0] in "aeiou" else "a", animal=animal)


def animal_in(prompt: str) -> int:
    """Index into `ANIMALS` of the one animal that `prompt` names.

    Raises:
        ValueError: the prompt names none of the animals, or several.
    """
    words = "".join(c if c.isalpha() else " " for c in prompt.lower()).split()
    named = {i for i, animal in enumerate(ANIMALS) if animal in words or animal + "s" in words}
    if len(named) != 1:
        raise ValueError(f"prompt {prompt!r} must name exactly one of the testbed's animals: {', '.join(ANIMALS)}")
    return named.pop()


@cache
def load_masks(split: str) -> tuple[Tensor, Tensor]:
    """Masks `[N, 28, 28]` in [0, 1] (float32) and labels `[N]` (int64) of one of the `SPLITS`."""
    with (files("fastnabla.testbed") / "data/animal_silhouettes.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        images, labels = archive["images"], archive["labels"]
    rows = np.isin(np.arange(len(labels)) % 10, SPLITS[split])
    return torch.from_numpy(images[rows]).float() / 255, torch.from_numpy(labels[rows]).long()


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB `[N, 3]` of colours given by `[N]` hues in turns, saturations and values in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] * 6) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def tint(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Colour images `[N, 3, 32, 32]` in [0, 1] from `masks [N, 28, 28]`, by the rows of `generator`.

    Every image gets its own hue, a dark or a light ground, a shift by up to one pixel and, with
    probability one half, a mirror.
    """
    n = len(masks)

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    flipped = torch.where((uniform() < 0.5)[:, None, None], masks.flip(-1), masks)
    padded = F.pad(flipped, (3, 3, 3, 3))
    row, column = (torch.randint(0, 3, (n,), generator=generator) for _ in range(2))
    span = torch.arange(IMAGE_SIZE)
    shifted = padded[
        torch.arange(n)[:, None, None], (row[:, None] + span)[:, :, None], (column[:, None] + span)[:, None]
    ]
    animal = hsv_to_rgb(uniform(), uniform(0.65, 1), uniform(0.75, 1))[:, :, None, None]
    ground = torch.where(uniform() < 0.5, uniform(0, 0.12), uniform(0.88, 1))[:, None, None, None]
    alpha = shifted[:, None]
    return alpha * animal + (1 - alpha) * ground
