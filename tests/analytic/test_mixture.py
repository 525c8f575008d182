"""The closed forms of the analytic testbed, against autograd, numerical integration and importance sampling."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.problems import PROBLEMS
from fastnabla.analytic.reward import QuadraticReward
from tests.checks import randn

F64 = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, a few hundred operations


def mixture(dimension: int, isotropic: bool = False) -> GaussianMixture:
    means = randn(3, dimension, dtype=F64)
    stds = 0.4 + 0.1 * randn(3, 1 if isotropic else dimension, seed=1, dtype=F64).abs()
    return GaussianMixture(torch.tensor([0.2, 0.5, 0.3], dtype=F64), means, stds)


def grid(dimension: int, points: int) -> tuple[torch.Tensor, float]:
    """Grid points `[points^D, D]` of [-7, 7]^D, and the volume of a cell."""
    axis = torch.linspace(-7, 7, points, dtype=F64)
    return torch.cartesian_prod(*[axis] * dimension).view(-1, dimension), (14 / (points - 1)) ** dimension


def rewards(dimension: int) -> list[QuadraticReward]:
    slope = randn(dimension, seed=2, dtype=F64)
    return [
        QuadraticReward(slope, torch.zeros_like(slope)),
        QuadraticReward.around(slope.tolist(), 0.7),
        QuadraticReward(slope, torch.linspace(0, 2, dimension, dtype=F64)),
    ]


@pytest.mark.parametrize("isotropic", [False, True])
def test_density_and_draws(isotropic):
    p = mixture(2, isotropic)
    parts = Independent(Normal(p.means, p.stds.expand_as(p.means)), 1)
    known = MixtureSameFamily(Categorical(p.weights), parts)
    x = randn(50, 2, seed=3, dtype=F64)
    torch.testing.assert_close(p.log_prob(x), known.log_prob(x), **EXACT)
    torch.testing.assert_close(
        p.responsibilities(x),
        (p.weights.log() + parts.log_prob(x[:, None]) - known.log_prob(x)[:, None]).exp(),
        **EXACT,
    )
    draws = p.sample(20_000, torch.Generator().manual_seed(0))
    error = (draws.mean(0) - known.mean).abs() / (known.variance / 20_000).sqrt()
    assert error.max() < 4  # standard errors
    torch.testing.assert_close(draws.var(0), known.variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("isotropic", [False, True])
def test_score_is_the_gradient_of_the_diffused_density(isotropic):
    p = mixture(3, isotropic)
    alpha_bar = torch.tensor([1.0, 0.99, 0.6, 0.1, 1e-3], dtype=F64)
    x = randn(5, 3, seed=4, dtype=F64).requires_grad_()
    density = torch.stack([p.diffused(a.item()).log_prob(x[i : i + 1])[0] for i, a in enumerate(alpha_bar)])
    (gradient,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(p.score(x, alpha_bar), gradient, **EXACT)


@pytest.mark.parametrize("alpha_bar", [0.9, 0.3])
def test_noise_prediction_is_the_posterior_mean_of_the_noise(alpha_bar):
    p = mixture(1)
    clean, _ = grid(1, 20_001)
    for x in (-1.0, 0.2, 2.5):
        noise = (x - math.sqrt(alpha_bar) * clean[:, 0]) / math.sqrt(1 - alpha_bar)
        posterior = (p.log_prob(clean) - 0.5 * noise**2).softmax(0)
        predicted = p.noise_prediction(torch.tensor([[x]], dtype=F64), torch.tensor([alpha_bar], dtype=F64))
        torch.testing.assert_close(predicted[0, 0], posterior @ noise, rtol=1e-9, atol=1e-9)


def test_posterior_is_of_the_diffused_mixtures_components():
    p, x = mixture(2), randn(20, 2, dtype=F64)
    alpha_bar = torch.linspace(0.05, 1, 20, dtype=F64)
    rows = [p.diffused(a.item()).responsibilities(point[None]) for a, point in zip(alpha_bar, x, strict=True)]
    torch.testing.assert_close(p.posterior(x, alpha_bar), torch.cat(rows), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize(("dimension", "points"), [(1, 20_001), (2, 701)])
def test_tilted_is_the_normalised_product(dimension, points, kind, beta):
    """On a grid: for Gaussians much wider than the spacing, the trapezoidal rule is exact up to rounding."""
    p, reward = mixture(dimension), rewards(dimension)[kind]
    x, cell = grid(dimension, points)
    product = p.log_prob(x) + beta * reward(x, ())
    expected = product - product.logsumexp(0) - math.log(cell)
    tilted = p.tilted(reward, beta)
    near = expected > -30
    torch.testing.assert_close(tilted.log_prob(x)[near], expected[near], rtol=1e-8, atol=1e-8)
    mean = (expected.exp() * cell) @ reward(x, ())
    torch.testing.assert_close(torch.tensor(tilted.mean_reward(reward), dtype=F64), mean, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("dimension", PROBLEMS)
def test_targets_of_the_problems_by_importance_sampling(dimension):
    """Means and mode masses of the target, within four standard errors of re-weighted draws from the pretrained mixture."""
    problem = PROBLEMS[dimension]()
    target = problem.mixture.tilted(problem.reward, 0.6)
    x = problem.mixture.sample(200_000, torch.Generator().manual_seed(0))
    weights = (0.6 * problem.reward(x, ())).softmax(0)
    for values, expected in (
        (x, target.weights @ target.means),
        (target.responsibilities(x), target.weights),
        (problem.reward(x, ())[:, None], torch.tensor([target.mean_reward(problem.reward)], dtype=F64)),
    ):
        error = (weights[:, None] * (values - expected)).sum(0)
        spread = (weights[:, None] * (values - expected)).square().sum(0).sqrt()
        assert (error.abs() / spread).max() < 4
    assert (target.weights / problem.mixture.weights).log().abs().max() > math.log(1.8)  # there is something to learn


def test_before_noise_by_integration_over_the_noise():
    """x given that x + ξ is tilted has the density p(x) E exp(β r(x + ξ)) / Z; ξ by Gauss-Hermite quadrature."""
    p, reward, beta, variance = mixture(1), rewards(1)[1], 1.5, torch.tensor([[0.3]], dtype=F64)
    noised = p.noised(variance)
    found = p.before_noise(noised, noised.tilted(reward, beta))
    x, cell = grid(1, 20_001)
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(60))
    tilt = (beta * reward((x + variance.sqrt() * nodes).view(-1, 1), ())).view(len(x), -1).exp() @ weights
    expected = p.log_prob(x) + tilt.log()
    expected = expected - expected.logsumexp(0) - math.log(cell)
    near = expected > -30
    torch.testing.assert_close(found.log_prob(x)[near], expected[near], rtol=1e-8, atol=1e-8)


def test_noised_is_of_the_sum():
    """A diffused mixture, scaled back, is the mixture with noise of variance (1 − ᾱ)/ᾱ."""
    p = mixture(2)
    diffused, noised = p.diffused(0.8), p.noised(torch.tensor([[0.25]], dtype=F64))
    torch.testing.assert_close(noised.stds, diffused.stds / math.sqrt(0.8), **EXACT)
    assert torch.equal(noised.means, p.means) and torch.equal(noised.weights, p.weights)


def test_a_tilt_without_normalisation_is_refused():
    p = mixture(1)
    with pytest.raises(ValueError, match="beta = 9"):
        p.tilted(QuadraticReward.around([0.0], -1.0), 9)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": torch.tensor([0.5, 0.6], dtype=F64)}, "weights"),
        ({"weights": torch.tensor([1.5, -0.5], dtype=F64)}, "weights"),
        ({"means": torch.zeros(2, 2)}, "means"),
        ({"stds": torch.zeros(2, 2, dtype=F64)}, "stds"),
        ({"stds": torch.ones(2, 3, dtype=F64)}, "stds"),
    ],
)
def test_what_is_no_mixture_is_refused(change, field):
    right = {"weights": torch.full((2,), 0.5, dtype=F64), "means": torch.zeros(2, 2, dtype=F64)}
    with pytest.raises(ValueError, match=field):
        GaussianMixture(**({"stds": torch.ones(2, 1, dtype=F64)} | right | change))
