"""Diversity of the samples of each prompt."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastnabla.distributed.beacon import BEACON
from fastnabla.rewards.testbed import chroma

HUE_BINS = 12


def mean_hue(images: Tensor) -> Tensor:
    """Hue `[B]` of the mean chroma, in turns, of images `[B, 3, H, W]` in [0, 1]."""
    x, y = chroma(images).mean((2, 3)).unbind(1)
    return torch.atan2(y, x) / (2 * math.pi) % 1


def hue_bins(hues: Tensor) -> Tensor:
    """Bin numbers `[N]` in 0…11 of `hues [N]`, in turns, as floats; nan where a hue is."""
    return (hues * HUE_BINS).floor().clamp(max=HUE_BINS - 1)


def hue_histogram(hues: Tensor, weights: Tensor) -> Tensor:
    """Weighted histogram `[12]`, float64, of `hues [N]`, in turns, with `weights [N]`. It is nan if a hue is."""
    bins, empty = hue_bins(hues), weights.new_zeros(HUE_BINS, dtype=torch.float64)
    return empty + math.nan if bool(bins.isnan().any()) else empty.index_add(0, bins.long(), weights.double())


def cell_entropy(cells: Tensor, count: int, prompt: Tensor) -> float:
    """Entropy of the histogram of `cells` within a prompt, relative to log `count` and averaged over prompts.

    Args:
        cells: the cell of each image `[B]`, in 0…count − 1, as floats; the result is nan if one is.
        count: number of cells.
        prompt: prompt numbers `[B]`.
    """
    if bool(cells.isnan().any()):
        return math.nan
    entropies = []
    for number in prompt.unique():
        own = cells[prompt == number]
        share = own.long().bincount(minlength=count).double() / len(own)
        entropies.append(-torch.special.xlogy(share, share).sum().item() / math.log(count))
    return sum(entropies) / len(entropies)


def entropy_ceiling(count: int, samples: int) -> float:
    """The expected `cell_entropy` of `samples` images per prompt that are uniform over `count` cells: below 1, and 0 for one
    image.

    With k ~ Binomial(n, 1/C) images in each of the C cells it is ``−C E[k/n log(k/n)] / log C``.
    """
    k = torch.arange(1, samples + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(samples, torch.tensor(1 / count, dtype=torch.float64))
    share = k / samples
    terms = binomial.log_prob(k).exp() * torch.special.xlogy(share, share)
    return -count * terms.sum().item() / math.log(count) + 0.0  # 0.0, not -0.0


def hue_entropy(hues: Tensor, prompt: Tensor) -> float:
    """Entropy of the hues over 12 bins, relative to its maximum and averaged over prompts.

    n images of a prompt have at most log n of entropy, so compare equal counts only. Shares of `hue_entropy_ceiling` are comparable between
    counts near uniform hues; further away, images of few hues have a larger share with fewer images, up to 0.1 of it with 6.

    Args:
        hues: `mean_hue` of each image `[B]`, in turns; the result is nan if one is.
        prompt: prompt numbers `[B]`.
    """
    return cell_entropy(hue_bins(hues), HUE_BINS, prompt)


def hue_entropy_ceiling(samples: int) -> float:
    """The expected `hue_entropy` of `samples` images per prompt with uniform hues."""
    return entropy_ceiling(HUE_BINS, samples)


def pairwise_distance(features: Tensor, prompt: Tensor) -> float:
    """Mean Euclidean distance between two different samples of a prompt, averaged over prompts.

    Args:
        features: `[B, D]`.
        prompt: prompt numbers `[B]`. Prompts with a single sample are left out; the result is nan if none remain.
    """
    groups = [features[prompt == number].double() for number in prompt.unique()]
    distances = [torch.nn.functional.pdist(group).mean().item() for group in groups if len(group) > 1]
    return sum(distances) / len(distances) if distances else math.nan


def weighted_pairwise_distance(features: Tensor, prompt: Tensor, weights: Tensor) -> float:
    """`pairwise_distance` of weighted samples: ``Σ_{i≠j} w_i w_j d_ij / Σ_{i≠j} w_i w_j`` for each prompt.

    Args:
        features: `[B, D]`.
        prompt: prompt numbers `[B]`. At least two samples of each prompt must have positive weight.
        weights: `[B]`, ≥ 0.
    """
    distances = []
    for number in prompt.unique():
        own, w = features[prompt == number].double(), weights[prompt == number].double()
        w = w / w.sum()
        between = torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist")  # exactly 0 on the diagonal
        distances.append((w @ between @ w / (1 - w.square().sum())).item())
    return sum(distances) / len(distances)


def mean_distance(
    images: Tensor, prompt: Tensor, distance: Callable[[Tensor, Tensor], Tensor], chunk: int | None = None
) -> float:
    """Mean `distance` between two different samples of a prompt, averaged over prompts.

    This is `pairwise_distance` for networks that compare images.

    Args:
        images: `[B, 3, H, W]`.
        prompt: prompt numbers `[B]`. Prompts with a single sample are left out; the result is nan if none remain.
        distance: two batches of images `[n, 3, H, W]` → `[n]`.
        chunk: largest number of pairs per call; None for all pairs of a prompt.
    """
    means = []
    for number in prompt.unique():
        rows = (prompt == number).nonzero()[:, 0]
        if len(rows) > 1:
            BEACON.advance()
            pairs = torch.combinations(rows)
            parts = [distance(images[part[:, 0]], images[part[:, 1]]) for part in pairs.split(chunk or len(pairs))]
            means.append(torch.cat(parts).double().mean().item())
    return sum(means) / len(means) if means else math.nan
