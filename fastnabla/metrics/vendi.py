"""Vendi score (Friedman, Dieng, *The Vendi Score*, TMLR 2023): the effective number of distinct samples."""

import math

import torch
from torch import Tensor


def vendi_score(features: Tensor) -> float:
    """exp of the von Neumann entropy of K/n, where K holds the cosine similarities of `features [n, D]`.

    It is 1 if all samples are identical and n if all are orthogonal. It is at most min(n, D), so compare equal n. It is nan
    if the features of a sample are all zero or not finite.
    """
    features = features.double()
    norm = features.norm(dim=1, keepdim=True)
    if not (torch.isfinite(norm) & (norm > 0)).all():
        return math.nan
    x = features / norm
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x  # both have the same nonzero eigenvalues
    share = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    return torch.exp(-torch.special.xlogy(share, share).sum()).item()


def mean_vendi_score(features: Tensor, prompt: Tensor) -> float:
    """`vendi_score` of each prompt's samples, averaged over prompts.

    Args:
        features: `[N, D]`.
        prompt: prompt numbers `[N]`.
    """
    scores = [vendi_score(features[prompt == number]) for number in prompt.unique()]
    return sum(scores) / len(scores)
