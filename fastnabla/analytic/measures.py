"""Comparing samples with a mixture: distances and their Monte-Carlo floor, and the spread of the samples over modes."""

import functools

import torch
from torch import Tensor

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.utils.seeding import generator_of


def mode_masses(samples: Tensor, mixture: GaussianMixture) -> Tensor:
    """Fraction `[K]` of `samples [N, D]` that belongs to each component: the mean responsibilities, which are unbiased."""
    return mixture.responsibilities(samples).mean(0)


def mode_mass_error(samples: Tensor, mixture: GaussianMixture) -> float:
    """Total variation ``½ Σ_k |mass_k − w_k|`` of the mode masses of `samples [N, D]`, in [0, 1]."""
    return 0.5 * (mode_masses(samples, mixture) - mixture.weights).abs().sum().item()


def sliced_wasserstein(samples: Tensor, mixture: GaussianMixture, directions: int = 128, points: int = 1024) -> float:
    """Mean Wasserstein-1 distance between projected samples and the projected mixture, over fixed random directions.

    A projected mixture is a mixture with a known distribution function F. The distance ``∫ |F_N(y) − F(y)| dy`` is computed
    by the trapezoidal rule. It has the unit of the states.

    Args:
        samples: `[N, D]` float64.
        mixture: the exact distribution.
        directions: number of projections.
        points: number of integration points, evenly spaced over the range of samples and mixture.
    """
    # Project samples and mixture.
    direction = torch.randn(mixture.dimension, directions, dtype=torch.float64, generator=generator_of(0, "evaluation"))
    direction = direction / direction.norm(dim=0)
    projected = (samples @ direction).T.sort(1).values.contiguous()
    means = (mixture.means @ direction).T
    stds = (mixture.stds.square().expand_as(mixture.means) @ direction.square()).T.sqrt()

    # Integrate the difference of the distribution functions.
    low = torch.minimum(projected[:, 0], (means - 5 * stds).amin(1))[:, None]
    high = torch.maximum(projected[:, -1], (means + 5 * stds).amax(1))[:, None]
    y = low + (high - low) * torch.linspace(0, 1, points, dtype=torch.float64)
    empirical = torch.searchsorted(projected, y, right=True) / len(samples)
    exact = torch.special.ndtr((y[..., None] - means[:, None]) / stds[:, None]) @ mixture.weights
    return torch.trapezoid((empirical - exact).abs(), y).mean().item()


DISTANCES = {"mode_mass_error": mode_mass_error, "sliced_wasserstein": sliced_wasserstein}
"""Name → distance between samples `[N, D]` and a mixture."""
REPEATS = 20
"""Number of sets of draws in a floor."""


def distances(samples: Tensor, mixture: GaussianMixture) -> dict[str, float]:
    """The `DISTANCES` between `samples [N, D]` and `mixture`."""
    return {name: distance(samples, mixture) for name, distance in DISTANCES.items()}


@functools.cache
def floors(mixture: GaussianMixture, count: int) -> dict[str, float]:
    """The Monte-Carlo floor: mean `DISTANCES` between `count` exact draws and their own mixture, over `REPEATS` draws."""
    found = [distances(mixture.sample(count, generator_of(0, "evaluation", i)), mixture) for i in range(REPEATS)]
    return {name: sum(values[name] for values in found) / REPEATS for name in DISTANCES}


def effective_number(masses: Tensor) -> float:
    """Exponential of the entropy of `masses [K]` that sum to 1: K if all are equal, 1 if a single one is positive."""
    return torch.special.entr(masses).sum().exp().item()


def effective_modes(samples: Tensor, mixture: GaussianMixture) -> float:
    """Effective number of modes that `samples [N, D]` cover; a collapsed policy covers fewer."""
    return effective_number(mode_masses(samples, mixture))


def mode_width(samples: Tensor, mixture: GaussianMixture) -> float:
    """RMS distance of `samples [N, D]` from the mean of their mode, relative to that of draws from `mixture`.

    A sample counts for each mode by its responsibility. So the width of the mixture's own draws tends to 1, however much the
    modes overlap. A collapsed policy has narrower modes.
    """
    responsibilities = mixture.responsibilities(samples)
    mass = responsibilities.sum(0)
    means = (responsibilities.T @ samples) / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None]
    squares = (samples[:, None] - means).square().sum(2)
    exact = mixture.weights @ mixture.stds.square().expand_as(mixture.means).sum(1)
    return ((responsibilities * squares).sum() / len(samples) / exact).sqrt().item()
