"""Rewards of the testbed. Each ignores some factors, whose diversity a finetuned model may keep or lose."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.testbed.classifier import load_classifier
from fastnabla.testbed.silhouettes import animal_in

Reward = Callable[[Tensor, Sequence[str]], Tensor]
PREFERRED_HUE = 0.6
"""The hue that `hue` prefers, in turns: blue."""


def foreground(images: Tensor) -> Tensor:
    """Soft foreground mask `[B, H, W]` of the animal, in [0, 1].

    It measures each pixel's distance from the ground (the border's mean colour), relative to the image's other pixels. So
    neither a stronger contrast nor a hue further from the ground increases the foreground.
    """
    edges = (images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1])
    ground = torch.cat(edges, -1).mean(-1)[..., None, None]
    distance = (images - ground).square().sum(1)
    contrast = distance.square().sum((1, 2)) / (distance.sum((1, 2)) + 1e-6)
    return 1 - torch.exp(-4 * distance / (contrast[:, None, None] + 0.02))


def chroma(images: Tensor) -> Tensor:
    """Chroma `[B, 2, H, W]` of the pixels: a vector whose angle is the hue, red at 0."""
    red, green, blue = images.unbind(1)
    return torch.stack([red - (green + blue) / 2, math.sqrt(3) / 2 * (green - blue)], 1)


def area(device: torch.device) -> Reward:
    """Fraction of the image that the animal covers, in [0, 1]. Independent of hue, ground, pose and position."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return foreground(images).mean((1, 2))

    return reward


def hue(device: torch.device) -> Reward:
    """Cosine of the angle between the image's mean chroma and `PREFERRED_HUE`, in [-1, 1]."""
    angle = 2 * math.pi * PREFERRED_HUE
    preferred = torch.tensor([math.cos(angle), math.sin(angle)], device=device)

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        mean = chroma(images).mean((2, 3))
        return mean @ preferred.to(mean) / (mean.square().sum(1) + 1e-4).sqrt()

    return reward


def classifier(device: torch.device) -> Reward:
    """Log-probability, in nats, of the prompt's animal under the reward classifier."""
    network = load_classifier("reward", device)

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        log_probability = network(images).log_softmax(1)
        wanted = torch.tensor([animal_in(prompt) for prompt in prompts], device=log_probability.device)
        return log_probability.gather(1, wanted[:, None])[:, 0]

    return reward
