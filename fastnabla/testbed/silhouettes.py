"""The testbed's data: silhouettes of ten animals, tinted with random hues.

10,000 grey masks of 28x28 pixels (MIT, see `data/LICENSE.animal_mnist.txt`) become 32x32 colour images. A prompt names the
animal. Hue, ground, pose and size are free, so a loss of diversity in finetuning is easy to see.

Images are split by position modulo 10. 0 is the *test* split, which is never trained on. The generator is trained on all
others, the reward classifier on 1-4 and the evaluation classifier on 5-9. So a sample that fools the reward does not
automatically fool the evaluation.
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
    """Index into `ANIMALS` of the animal that `prompt` names.

    Raises:
        ValueError: the prompt names no animal, or several.
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
    """Convert hues `[N]` in turns, and saturations and values `[N]` in [0, 1], to RGB `[N, 3]`."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] * 6) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def tint(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Make random colour images `[N, 3, 32, 32]` in [0, 1] from `masks [N, 28, 28]`.

    Each image has a random hue and a dark or light ground, is shifted by up to one pixel, and is mirrored with probability
    1/2.
    """
    n = len(masks)

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    # Mirror and shift.
    flipped = torch.where((uniform() < 0.5)[:, None, None], masks.flip(-1), masks)
    padded = F.pad(flipped, (3, 3, 3, 3))
    row, column = (torch.randint(0, 3, (n,), generator=generator) for _ in range(2))
    span = torch.arange(IMAGE_SIZE)
    shifted = padded[
        torch.arange(n)[:, None, None], (row[:, None] + span)[:, :, None], (column[:, None] + span)[:, None]
    ]

    # Colour the animal and the ground.
    animal = hsv_to_rgb(uniform(), uniform(0.65, 1), uniform(0.75, 1))[:, :, None, None]
    ground = torch.where(uniform() < 0.5, uniform(0, 0.12), uniform(0.88, 1))[:, None, None, None]
    alpha = shifted[:, None]
    return alpha * animal + (1 - alpha) * ground
