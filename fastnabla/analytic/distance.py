"""How far samples are from a mixture, and how far as many samples of the mixture itself would seem to be."""

import functools

import torch
from torch import Tensor

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.utils.seeding import generator_of


def mode_masses(samples: Tensor, mixture: GaussianMixture) -> Tensor:
    """Shares `[K]` of `samples [N, D]` that belong to the components: their mean responsibilities, which are unbiased."""
    return mixture.responsibilities(samples).mean(0)


def mode_mass_error(samples: Tensor, mixture: GaussianMixture) -> float:
    """Total variation ``½ Σ_k |mass_k − w_k|`` of the mode masses of `samples [N, D]`, in [0, 1]."""
    return 0.5 * (mode_masses(samples, mixture) - mixture.weights).abs().sum().item()


def sliced_wasserstein(samples: Tensor, mixture: GaussianMixture, directions: int = 128, points: int = 1024) -> float:
    """Mean over fixed random directions of the Wasserstein-1 distance between the projected samples and mixture.

    A projected mixture is a mixture, with a known distribution function F; the distance is ``∫ |F_N(y) − F(y)| dy``, by
    the trapezoidal rule. It has the unit of the states.

    Args:
        samples: `[N, D]` float64.
        mixture: what they are compared with, exactly.
        directions: projections.
        points: of the integral, evenly over the range of samples and mixture.
    """
    direction = torch.randn(mixture.dimension, directions, dtype=torch.float64, generator=generator_of(0, "evaluation"))
    direction = direction / direction.norm(dim=0)
    projected = (samples @ direction).T.sort(1).values.contiguous()
    means = (mixture.means @ direction).T
    stds = (mixture.stds.square().expand_as(mixture.means) @ direction.square()).T.sqrt()
    low = torch.minimum(projected[:, 0], (means - 5 * stds).amin(1))[:, None]
    high = torch.maximum(projected[:, -1], (means + 5 * stds).amax(1))[:, None]
    y = low + (high - low) * torch.linspace(0, 1, points, dtype=torch.float64)
    share = torch.searchsorted(projected, y, right=True) / len(samples)
    exact = torch.special.ndtr((y[..., None] - means[:, None]) / stds[:, None]) @ mixture.weights
    return torch.trapezoid((share - exact).abs(), y).mean().item()


DISTANCES = {"mode_mass_error": mode_mass_error, "sliced_wasserstein": sliced_wasserstein}
"""By name: samples `[N, D]` and a mixture to a distance."""


def distances(samples: Tensor, mixture: GaussianMixture) -> dict[str, float]:
    """The `DISTANCES` of `samples [N, D]` from `mixture`."""
    return {name: distance(samples, mixture) for name, distance in DISTANCES.items()}


@functools.cache
def floors(mixture: GaussianMixture, count: int, repeats: int = 20) -> dict[str, float]:
    """Mean `DISTANCES` of `count` exact draws from the mixture they are of, over `repeats`: the Monte-Carlo floor."""
    seen = [distances(mixture.sample(count, generator_of(0, "evaluation", i)), mixture) for i in range(repeats)]
    return {name: sum(values[name] for values in seen) / repeats for name in DISTANCES}
