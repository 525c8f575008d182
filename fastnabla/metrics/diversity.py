"""Diversity within prompts."""

import math

import torch
from torch import Tensor

from fastnabla.rewards.testbed import chroma

HUE_BINS = 12


def mean_hue(images: Tensor) -> Tensor:
    """Hue `[B]`, in turns, of the mean chroma of images `[B, 3, H, W]` in [0, 1]."""
    x, y = chroma(images).mean((2, 3)).unbind(1)
    return torch.atan2(y, x) / (2 * math.pi) % 1


def hue_entropy(images: Tensor, prompt: Tensor) -> float:
    """Entropy of the images' mean hues over 12 bins, averaged over prompts, as a share of its maximum.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        prompt: prompt numbers `[B]`.

    n images of a prompt cannot show more than log n of entropy, so compare only equal counts.
    """
    bins = (mean_hue(images) * HUE_BINS).long().clamp(max=HUE_BINS - 1)
    entropies = []
    for number in prompt.unique():
        share = torch.bincount(bins[prompt == number], minlength=HUE_BINS).double()
        share = share / share.sum()
        entropies.append(-torch.special.xlogy(share, share).sum().item() / math.log(HUE_BINS))
    return sum(entropies) / len(entropies)


def pairwise_distance(features: Tensor, prompt: Tensor) -> float:
    """Mean Euclidean distance between two different samples of a prompt, averaged over prompts.

    Args:
        features: `[B, D]`.
        prompt: prompt numbers `[B]`; a prompt with a single sample does not count. nan if all are.
    """
    groups = [features[prompt == number].double() for number in prompt.unique()]
    distances = [torch.nn.functional.pdist(group).mean().item() for group in groups if len(group) > 1]
    return sum(distances) / len(distances) if distances else math.nan
