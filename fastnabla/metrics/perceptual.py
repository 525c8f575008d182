"""Probes for photographs: CLIP, LPIPS and DreamSim, with published weights or those in a local folder.

lpips and dreamsim are optional packages that download their own weights. The tests replace them with stubs of the same
interface (lpips 0.1, dreamsim 0.2).
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fastnabla.rewards.clip import POSITION_IDS, ClipReward
from fastnabla.rewards.clipscore import REPOSITORY, ClipScore
from fastnabla.rewards.preprocess import resize
from fastnabla.rewards.weights import load_weights, read_state_dict

ALEXNET = "alexnet-owt-7be5be79.pth"
"""torchvision's AlexNet, the trunk of LPIPS."""


class ClipProbe:
    """Normalised CLIP image embeddings: half the squared distance is 1 minus the cosine similarity.

    Args:
        reward: provides CLIP and its preprocessing.
    """

    def __init__(self, reward: ClipReward) -> None:
        self.reward = reward

    @classmethod
    def build(cls, device: torch.device | str, folder: Path | None = None) -> "ClipProbe":
        """Build the probe.

        Args:
            device: device of the network.
            folder: a CLIP in transformers' format, config.json and model.safetensors. None: OpenAI's ViT-L/14, with the weights
                of the reward clipscore.

        Raises:
            ValueError: the weights are missing and cannot be downloaded, or cannot be read.
        """
        if folder is None:
            return cls(ClipScore.build(torch.device(device)))
        remedy = f"download them with: hf download {REPOSITORY} config.json model.safetensors --local-dir {folder}"
        config, weights = (_file(folder, name, remedy) for name in ("config.json", "model.safetensors"))
        try:
            clip = CLIPModel(CLIPConfig.from_pretrained(config.parent))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{str(config)!r} is not the configuration of a CLIP ({error}).") from error
        load_weights("clip", clip, read_state_dict("clip", weights), ignore=(POSITION_IDS,))
        return cls(ClipScore(clip.to(device), tokenize=_images_only))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features `[B, D]` with norm 1."""
        pixel_values = self.reward.preprocess(images.float())
        return F.normalize(self.reward.clip.get_image_features(pixel_values).pooler_output, dim=-1)


class LpipsProbe:
    """LPIPS (arXiv 1801.03924) with AlexNet. It compares images and has no features of fixed length, so it provides pairwise
    distances only.

    Args:
        device: device of the network.
        folder: has the file `ALEXNET`. None: torchvision downloads it. The layers on top are in the package.

    Raises:
        ValueError: lpips is not installed, or the file is missing or does not fit.
    """

    def __init__(self, device: torch.device | str, folder: Path | None = None) -> None:
        network = _package("lpips").LPIPS(net="alex", verbose=False, pnet_rand=folder is not None)
        if folder is not None:
            url = f"https://download.pytorch.org/models/{ALEXNET}"
            state = read_state_dict("lpips", _file(folder, ALEXNET, f"download {url}"))
            # LPIPS cuts AlexNet's features into slices: slice2.3.weight is features.3.weight.
            own = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}
            load_weights("lpips", network.net, {name: state[theirs] for name, theirs in own.items() if theirs in state})
        self.network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """LPIPS `[B]` between two batches of images `[B, 3, H, W]` in [0, 1]."""
        return self.network(images.float(), others.float(), normalize=True).flatten()


class DreamSimProbe:
    """Normalised embeddings of DreamSim's ensemble (arXiv 2306.09344): half the squared distance is DreamSim's distance.

    Args:
        device: device of the networks.
        folder: the package's `cache_dir`, into which it downloads weights that are missing. None: its default.

    Raises:
        ValueError: dreamsim is not installed.
    """

    def __init__(self, device: torch.device | str, folder: Path | None = None) -> None:
        where = {} if folder is None else {"cache_dir": str(folder)}
        self.network, _ = _package("dreamsim").dreamsim(pretrained=True, device=str(device), **where)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features `[B, D]` with norm 1. Images are resized to 224 pixels as in the package, but not rounded to 8 bits."""
        embedding = self.network.embed(resize(images.float(), 224, 224).clamp(0, 1))
        return F.normalize(embedding.view(len(images), -1), dim=-1)


PERCEPTUAL: dict[str, Callable[[torch.device | str, Path | None], Any]] = {
    "clip": ClipProbe.build,
    "lpips": LpipsProbe,
    "dreamsim": DreamSimProbe,
}
"""Name → builder: device, folder of weights → probe."""


def _file(folder: Path, name: str, remedy: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"there is no {str(folder / name)!r}; {remedy}")
    return folder / name


def _images_only(prompt: str) -> list[int]:
    raise NotImplementedError


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"evaluation.probe = {name!r}: the package cannot be imported ({error}); run: pip install {name}"
        ) from error
