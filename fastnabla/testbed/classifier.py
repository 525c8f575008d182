"""The testbed's classifier. Its log-probability is a reward; its features measure diversity."""

from importlib.resources import files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastnabla.testbed.silhouettes import ANIMALS


class AnimalClassifier(nn.Module):
    """A small convolutional network over images `[B, 3, 32, 32]` in [0, 1]."""

    def __init__(self, widths: tuple[int, ...] = (24, 40, 56, 56)) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i, (fan_in, width) in enumerate(zip((3, *widths), widths, strict=False)):
            blocks += [nn.Conv2d(fan_in, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            if i < 3:
                blocks.append(nn.AvgPool2d(2))
        self.trunk = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1] * 4, len(ANIMALS))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features `[B, 224]`: the last feature map, averaged over quadrants."""
        maps = self.trunk(images * 2 - 1)
        return nn.functional.avg_pool2d(maps, maps.shape[-1] // 2).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, 10]`, in the order of `ANIMALS`."""
        return self.head(self.features(images))


def load_classifier(role: str, device: torch.device | str = "cpu") -> AnimalClassifier:
    """Load the frozen float32 classifier for `role`, ``"reward"`` or ``"evaluation"``. Their training data are disjoint."""
    path = files("fastnabla.testbed") / f"data/classifier_{role}.safetensors"
    network = AnimalClassifier()
    network.load_state_dict({name: weight.float() for name, weight in load_file(str(path)).items()})
    return network.requires_grad_(False).eval().to(device)
