"""Probes: networks, or other maps of an image, whose features measure diversity and distance from the prior.

A probe is an object with ``features(images [B, 3, H, W]) → [B, D]``, or, if it can only compare images, with
``distance(images, others) → [B]``. It may also have ``accuracy(images, prompts) → float``, and ``is_correct(images, prompts) →
[B]`` for the same of each image. The names are:

- "testbed": the testbed's evaluation classifier, which is independent of the reward's.
- "clip", "lpips" and "dreamsim": probes for photographs. "clip:FOLDER", and so on: with the weights in a local folder.
- "pixels": the image averaged to 8 × 8 pixels, without a network.
- ``module:function``: a function without arguments that returns your own probe.
- "none": no probe; metrics that need one are left out.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnabla.metrics.perceptual import PERCEPTUAL
from fastnabla.metrics.pixels import PixelProbe
from fastnabla.testbed.classifier import load_classifier
from fastnabla.testbed.silhouettes import animal_in
from fastnabla.utils.user_code import import_function, in_words, is_path


class TestbedProbe:
    """The evaluation classifier of the testbed."""

    def __init__(self, device: torch.device | str) -> None:
        self.network = load_classifier("evaluation", device)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate layer `[B, 224]`."""
        return self.network.features(images)

    def is_correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether each image is classified as its prompt's animal, bool `[B]`. An image that is not finite is not."""
        wanted = torch.tensor([animal_in(prompt) for prompt in prompts], device=images.device)
        logits = self.network(images)
        return (logits.argmax(1) == wanted) & logits.isfinite().all(1)

    def accuracy(self, images: Tensor, prompts: Sequence[str]) -> float:
        """Fraction of the images that are classified as the prompt's animal."""
        return self.is_correct(images, prompts).float().mean().item()


def build_probe(name: str, device: torch.device | str) -> Any | None:
    """Build the probe called `name`; None for "none".

    Raises:
        ValueError: the name is unknown or cannot be imported, its function fails, or the probe's package or weights are missing.
    """
    if name == "none":
        return None
    if name == "testbed":
        return TestbedProbe(device)
    if name == "pixels":
        return PixelProbe()
    module, colon, function = name.partition(":")
    if module in PERCEPTUAL:
        return _perceptual(module, Path(os.path.expanduser(function)) if colon else None, device)
    if not is_path(name):
        raise ValueError(
            f"evaluation.probe = {name!r:.200}: must be 'testbed', 'pixels', 'none', one of {', '.join(PERCEPTUAL)}, or your own, "
            "path.to.module:function."
        )
    build = import_function(name, "evaluation.probe", "take no arguments and return a probe")
    try:
        return build()
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"evaluation.probe = {name!r:.200}: fails ({in_words(error)}); mend it, or name another probe."
        ) from error


def _perceptual(name: str, folder: Path | None, device: torch.device | str) -> Any:
    if folder is None:
        try:
            return PERCEPTUAL[name](device, None)
        except ValueError as error:
            raise ValueError(
                f"evaluation.probe = {name!r}: {error}. The probe takes a local copy as {name}:FOLDER."
            ) from error
    try:
        if not folder.is_dir():
            raise ValueError("there is no such folder of weights.")
        return PERCEPTUAL[name](device, folder)
    except ValueError as error:
        raise ValueError(f"evaluation.probe = '{name}:{folder}': {error}") from error
