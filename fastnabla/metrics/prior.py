"""Distance from the prior: Fréchet distances between finetuned and pretrained samples."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Moments:
    """Mean `[D]` and covariance `[D, D]` of a Gaussian, float64."""

    mean: Tensor
    covariance: Tensor


def gaussian_moments(features: Tensor, weights: Tensor) -> Moments:
    """Moments of `features [N, D]` with `weights [N]` that sum to 1.

    The covariance is divided by 1 − Σw², so it is unbiased if the weights do not depend on the features. With equal weights
    this is the usual N − 1.

    Raises:
        ValueError: one sample has all the weight, so there is no covariance.
    """
    features, weights = features.double(), weights.double()
    spread = 1 - weights.square().sum()
    if spread < 1e-12:
        raise ValueError(
            "one sample has all the weight, so there is no covariance; take more samples or a smaller beta."
        )
    mean = weights @ features
    centred = features - mean
    return Moments(mean, (weights[:, None] * centred).T @ centred / spread)


def equal_weights(count: int) -> Tensor:
    """Weights `[count]`, float64, that are equal and sum to 1."""
    return torch.full((count,), 1 / count, dtype=torch.float64)


def frechet_between(a: Moments, b: Moments) -> float:
    """Fréchet distance (squared 2-Wasserstein distance) between Gaussians:
    ``|m_a − m_b|² + tr C_a + tr C_b − 2 tr (C_a^½ C_b C_a^½)^½`` (Dowson, Landau 1982)."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return (shift + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


class _Features(torch.nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to `features [N, D]` and `reference [M, D]`.

    This is a distance to the pretrained model's samples in the features of some network, not the FID of a data set. It is
    biased upwards for few samples, so compare equal counts. It is nan if a feature is not finite.
    """
    if not (features.isfinite().all() and reference.isfinite().all()):
        return math.nan
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes half a second to import

    # Without syncing: torchmetrics would add the samples of other ranks, and hang if a rank has none.
    metric = FrechetInceptionDistance(feature=_Features(features.shape[1]), sync_on_compute=False)
    metric.update(reference.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return metric.compute().item()


def sample_frechet_distance(features: Tensor, reference: Tensor) -> float:
    """`frechet_between` the Gaussians fitted to `features [N, D]` and `reference [M, D]`, fast for few samples in many dimensions.

    With A and B the centred samples divided by √(N − 1) and √(M − 1), the covariances are AᵀA and BᵀB, and
    ``tr (C_a^½ C_b C_a^½)^½`` is the sum of the singular values of A Bᵀ `[N, M]`.

    It is nan if a set has a single sample or a feature is not finite.
    """
    a, b = features.double(), reference.double()
    if min(len(a), len(b)) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return (shift + a.square().sum() + b.square().sum() - 2 * cross).item()


def mean_within_prompts(
    distance: Callable[[Tensor, Tensor], float],
    features: Tensor,
    prompt: Tensor,
    reference: Tensor,
    reference_prompt: Tensor,
) -> float:
    """`distance` between `features [N, D]` and `reference [M, D]` of the same prompt, averaged over prompts.

    With `sample_frechet_distance`, this is what arXiv 2412.07775 calls FID: per prompt, against samples of the pretrained
    model, not against a data set.

    Args:
        distance: features of two sets of samples → distance.
        prompt, reference_prompt: prompt numbers `[N]` and `[M]`.
    """
    distances = [
        distance(features[prompt == number], reference[reference_prompt == number]) for number in prompt.unique()
    ]
    return sum(distances) / len(distances)
