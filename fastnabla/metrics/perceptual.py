"""Probes for photographs: CLIP, LPIPS and DreamSim.

lpips and dreamsim are optional packages that download their own weights. The tests replace them with stubs of the same
interface (lpips 0.1, dreamsim 0.2).
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnabla.rewards import published_class
from fastnabla.rewards.clip import ClipReward
from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.preprocess import resize


class ClipProbe:
    """Normalised CLIP image embeddings: half the squared distance is 1 minus the cosine similarity.

    Args:
        reward: provides CLIP and its preprocessing.
    """

    def __init__(self, reward: ClipReward) -> None:
        self.reward = reward

    @classmethod
    def build(cls, device: torch.device | str, options: RewardOptions = DEFAULTS) -> "ClipProbe":
        """Build the probe with OpenAI's ViT-L/14, whose weights are those of the reward clipscore.

        Raises:
            ValueError: the weights are not in the hub's cache and cannot be downloaded.
        """
        return cls(published_class("clipscore").build(torch.device(device), options))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features `[B, D]` with norm 1."""
        pixel_values = self.reward.preprocess(images.float())
        return F.normalize(self.reward.clip.get_image_features(pixel_values).pooler_output, dim=-1)


class LpipsProbe:
    """LPIPS (arXiv 1801.03924) with AlexNet. It compares images and has no features of fixed length, so it provides pairwise
    distances only.

    Raises:
        ValueError: lpips is not installed.
    """

    def __init__(self, device: torch.device | str) -> None:
        network = _package("lpips").LPIPS(net="alex", verbose=False)
        self.network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """LPIPS `[B]` between two batches of images `[B, 3, H, W]` in [0, 1]."""
        return self.network(images.float(), others.float(), normalize=True).flatten()


class DreamSimProbe:
    """Normalised embeddings of DreamSim's ensemble (arXiv 2306.09344): half the squared distance is DreamSim's distance.

    Raises:
        ValueError: dreamsim is not installed.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.network, _ = _package("dreamsim").dreamsim(pretrained=True, device=str(device))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features `[B, D]` with norm 1. Images are resized to 224 pixels as in the package, but not rounded to 8 bits."""
        embedding = self.network.embed(resize(images.float(), 224, 224).clamp(0, 1))
        return F.normalize(embedding.view(len(images), -1), dim=-1)


PERCEPTUAL: dict[str, Callable[[torch.device | str], Any]] = {
    "clip": ClipProbe.build,
    "lpips": LpipsProbe,
    "dreamsim": DreamSimProbe,
}
"""Name → builder: device → probe."""


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"evaluation.probe = {name!r}: the package cannot be imported ({error}); run: pip install {name}"
        ) from error
