"""Distances from the pretrained model's samples, and the values that they have for the pretrained model itself."""

from typing import Any

import torch

from fastnabla.metrics.kernel_distance import kernel_distance
from fastnabla.metrics.measures import Measures, concatenate
from fastnabla.metrics.prior import (
    equal_weights,
    frechet_between,
    gaussian_moments,
    mean_within_prompts,
    sample_frechet_distance,
)

SPACES = {"": "features", "pixel_": "pixels"}
"""Prefix of the names → features that are compared."""
FOLDS = 8
"""The most folds of a floor."""


def reference_distances(samples: Measures, reference: Measures) -> dict[str, float]:
    """Fréchet and kernel distances by name, in the probe's features (if it has any) and in pixels.

    Each is given for all prompts together, with equal weights, and within prompts, averaged. Both sets have the same
    prompts, with equally many samples of each.
    """
    found = {}
    for prefix, space in SPACES.items():
        a, b = getattr(samples, space), getattr(reference, space)
        if a is None or b is None:
            continue
        prompts = {"prompt": samples.prompt, "reference_prompt": reference.prompt}
        moments = (gaussian_moments(rows, equal_weights(len(rows))) for rows in (a, b))
        found |= {
            f"{prefix}frechet_to_reference": frechet_between(*moments),
            f"{prefix}frechet_to_reference_within_prompts": mean_within_prompts(
                sample_frechet_distance, a, reference=b, **prompts
            ),
            f"{prefix}kernel_distance_to_reference": kernel_distance(a, b, **prompts),
            f"{prefix}kernel_distance_to_reference_within_prompts": mean_within_prompts(
                kernel_distance, a, reference=b, **prompts
            ),
        }
    return found


def reference_floor(pretrained: Measures, reference: Measures) -> dict[str, dict[str, Any]]:
    """The `reference_distances` between two sets of pretrained samples that are as large as those compared elsewhere.

    All samples of the pretrained model are pooled, n + M per prompt. Each fold takes n of them as the first set and the other
    M as the second. The first fold is `pretrained` against `reference`; no sample is in the first set of two folds.

    Args:
        pretrained: samples of the pretrained model, n per prompt, ordered by prompt.
        reference: further ones, M per prompt, in the same order of prompts.

    Returns:
        For each distance its "mean" over at most 8 folds, and their standard deviation, "std", or None with one fold.
        The folds share samples, so the standard deviation over independent sets is somewhat larger.
    """
    prompts = len(pretrained.prompt.unique())
    pool, n = concatenate([pretrained, reference]), len(pretrained) // prompts
    own, other = torch.arange(len(pool)).tensor_split([len(pretrained)])
    rows = torch.cat([own.view(prompts, -1), other.view(prompts, -1)], 1)
    folds = []
    for start in range(0, min(rows.shape[1] // n, FOLDS) * n, n):
        first = rows[:, start : start + n]
        second = torch.cat([rows[:, :start], rows[:, start + n :]], 1)
        folds.append(reference_distances(pool[first.flatten()], pool[second.flatten()]))
    values = {name: torch.tensor([fold[name] for fold in folds], dtype=torch.float64) for name in folds[0]}
    return {
        name: {"mean": value.mean().item(), "std": value.std().item() if len(folds) > 1 else None}
        for name, value in values.items()
    }
