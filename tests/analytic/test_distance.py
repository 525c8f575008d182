"""Distances of samples from a mixture, on samples whose distance is known."""

import pytest
import torch
from scipy.stats import norm

from fastnabla.analytic.distance import floors, mode_mass_error, mode_masses, sliced_wasserstein
from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.problems import PROBLEMS

F64 = torch.float64


def gaussian(std: float = 1.0) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.full((1, 1), std, dtype=F64))


def quantiles(count: int = 10_000) -> torch.Tensor:
    """Evenly spaced quantiles of the standard normal distribution, `[count, 1]`."""
    return torch.tensor(norm.ppf((torch.arange(count) + 0.5) / count))[:, None]


@pytest.mark.parametrize("shift", [0.0, 0.3, -2.0])
def test_wasserstein_of_a_shift(shift):
    """In one dimension all directions are one. 2e-3: the quantiles' own distance is 3e-4, the integral's error less."""
    assert sliced_wasserstein(quantiles() + shift, gaussian()) == pytest.approx(abs(shift), abs=2e-3)


def test_wasserstein_of_a_scale():
    """``W₁(N(0, 1), N(0, s²)) = |s − 1| E|z|``."""
    assert sliced_wasserstein(quantiles(), gaussian(1.5)) == pytest.approx(0.5 * (2 / torch.pi) ** 0.5, abs=2e-3)


def test_sliced_wasserstein_averages_over_directions():
    """A shift by δ in D = 2 is ``|cos| δ`` along a direction: 2/π of it on average. 5%: there are 128 directions."""
    axis = quantiles(400)[:, 0]
    mixture = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.ones(1, 1, dtype=F64))
    distance = sliced_wasserstein(torch.cartesian_prod(axis, axis) + torch.tensor([3.0, 0.0]), mixture)
    assert distance == pytest.approx(3 * 2 / torch.pi, rel=0.05)


def test_mode_masses_are_unbiased():
    target = PROBLEMS[2]().mixture
    samples = target.sample(50_000, torch.Generator().manual_seed(0))
    spread = (target.weights * (1 - target.weights) / 50_000).sqrt()
    assert ((mode_masses(samples, target) - target.weights).abs() / spread).max() < 4  # standard errors


def test_a_lost_mode_is_its_mass_of_error():
    """Modes 17 standard deviations apart: no draw is another's."""
    ring = PROBLEMS[2]().mixture
    target = GaussianMixture(ring.weights, ring.means, ring.stds / 4)
    first = GaussianMixture(torch.ones(1, dtype=F64), target.means[:1], target.stds[:1])
    samples = first.sample(1_000, torch.Generator().manual_seed(0))
    assert mode_mass_error(samples, target) == pytest.approx(1 - target.weights[0].item(), abs=1e-9)


@pytest.mark.parametrize("dimension", PROBLEMS)
def test_floors_fall_with_the_root_of_the_samples(dimension):
    """By 2 from 500 samples to 2,000; 25%: the mean of 20 draws of each varies by a tenth."""
    target = PROBLEMS[dimension]().mixture
    few, many = floors(target, 500), floors(target, 2_000)
    for name, floor in few.items():
        assert floor / many[name] == pytest.approx(2, rel=0.25)
