"""Distances and spread of samples, in cases with known answers."""

import math

import pytest
import torch
from scipy.stats import norm

from fastnabla.analytic.measures import (
    effective_modes,
    effective_number,
    floors,
    mode_mass_error,
    mode_masses,
    mode_width,
    sliced_wasserstein,
)
from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.problems import PROBLEMS
from fastnabla.utils.seeding import generator_of

F64 = torch.float64
COUNT = 20_000
"""Number of draws. The standard error of the measures is below 0.01."""


def gaussian(std: float = 1.0) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.full((1, 1), std, dtype=F64))


def quantiles(count: int = 10_000) -> torch.Tensor:
    """Evenly spaced quantiles of the standard normal distribution, `[count, 1]`."""
    return torch.tensor(norm.ppf((torch.arange(count) + 0.5) / count))[:, None]


@pytest.mark.parametrize("shift", [0.0, 0.3, -2.0])
def test_wasserstein_of_a_shift(shift):
    """In 1-D all directions are the same. The tolerance covers the quantiles' own distance, 3e-4, and the integral's error."""
    assert sliced_wasserstein(quantiles() + shift, gaussian()) == pytest.approx(abs(shift), abs=2e-3)


def test_wasserstein_of_a_scale():
    """``W₁(N(0, 1), N(0, s²)) = |s − 1| E|z|``."""
    assert sliced_wasserstein(quantiles(), gaussian(1.5)) == pytest.approx(0.5 * (2 / torch.pi) ** 0.5, abs=2e-3)


@pytest.mark.slow
def test_sliced_wasserstein_averages_over_directions():
    """In 2-D a shift by δ is ``|cos| δ`` along a direction, 2/π δ on average. The tolerance of 5% is for 128 directions."""
    axis = quantiles(200)[:, 0]
    mixture = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.ones(1, 1, dtype=F64))
    distance = sliced_wasserstein(torch.cartesian_prod(axis, axis) + torch.tensor([3.0, 0.0]), mixture)
    assert distance == pytest.approx(3 * 2 / torch.pi, rel=0.05)


def test_mode_masses_are_unbiased():
    target = PROBLEMS[2]().mixture
    samples = target.sample(50_000, torch.Generator().manual_seed(0))
    spread = (target.weights * (1 - target.weights) / 50_000).sqrt()
    assert ((mode_masses(samples, target) - target.weights).abs() / spread).max() < 4  # standard errors


def test_a_lost_mode_is_its_mass_of_error():
    """The modes are 17 standard deviations apart, so every draw belongs to its own mode."""
    ring = PROBLEMS[2]().mixture
    target = GaussianMixture(ring.weights, ring.means, ring.stds / 4)
    first = GaussianMixture(torch.ones(1, dtype=F64), target.means[:1], target.stds[:1])
    samples = first.sample(1_000, torch.Generator().manual_seed(0))
    assert mode_mass_error(samples, target) == pytest.approx(1 - target.weights[0].item(), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dimension", PROBLEMS)
def test_floors_fall_with_the_root_of_the_samples(dimension):
    """By a factor of 2 from 500 to 2,000 samples. The tolerance is 25%, because a mean over 20 draws varies by a tenth."""
    target = PROBLEMS[dimension]().mixture
    few, many = floors(target, 500), floors(target, 2_000)
    for name, floor in few.items():
        assert floor / many[name] == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("dimension", PROBLEMS)
def test_exact_draws_have_the_mixtures_spread(dimension):
    mixture = PROBLEMS[dimension]().mixture
    samples = mixture.sample(COUNT, generator_of(0, "evaluation"))
    assert mode_width(samples, mixture) == pytest.approx(1, abs=0.02)
    assert effective_modes(samples, mixture) == pytest.approx(effective_number(mixture.weights), abs=0.05)


def test_overlapping_modes_are_no_narrower():
    """Responsibilities are soft: each sample counts for all modes that it may belong to."""
    means = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mixture = GaussianMixture(means.new_tensor([0.3, 0.7]), means, torch.ones_like(means))
    assert mode_width(mixture.sample(COUNT, generator_of(0, "evaluation")), mixture) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("width", [0.5, 0.1])
def test_one_narrow_mode(width):
    """The second mode is far away and has mass exactly 0, which must not be divided by."""
    means = torch.tensor([[0.0, 0.0], [1e3, 0.0]], dtype=torch.float64)
    mixture = GaussianMixture(means.new_tensor([0.5, 0.5]), means, means.new_full((2, 1), 2.0))
    samples = width * GaussianMixture(means.new_ones(1), means[:1], means.new_full((1, 1), 2.0)).sample(
        COUNT, generator_of(0, "evaluation")
    )
    assert effective_modes(samples, mixture) == pytest.approx(1)
    assert mode_width(samples, mixture) == pytest.approx(width, rel=0.02)


def test_effective_number():
    assert effective_number(torch.tensor([0.25] * 4)) == pytest.approx(4)
    assert effective_number(torch.tensor([1.0, 0.0])) == 1
    assert effective_number(torch.tensor([0.9, 0.1])) == pytest.approx(
        math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    )
