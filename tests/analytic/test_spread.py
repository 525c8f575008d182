"""The measures of spread against mixtures whose spread is known, and the reward that has the prior in it."""

import math

import pytest
import torch

from fastnabla.analytic.mixture import GaussianMixture
from fastnabla.analytic.prior import RewardWithPrior, told
from fastnabla.analytic.problems import PROBLEMS
from fastnabla.analytic.spread import effective_modes, effective_number, mode_width
from fastnabla.utils.seeding import generator_of

COUNT = 20_000
"""Draws; a standard error of the measures is below 0.01."""


@pytest.mark.parametrize("dimension", PROBLEMS)
def test_exact_draws_have_the_mixtures_spread(dimension):
    mixture = PROBLEMS[dimension]().mixture
    samples = mixture.sample(COUNT, generator_of(0, "evaluation"))
    assert mode_width(samples, mixture) == pytest.approx(1, abs=0.02)
    assert effective_modes(samples, mixture) == pytest.approx(effective_number(mixture.weights), abs=0.05)


def test_overlapping_modes_are_no_narrower():
    """Responsibilities are soft, so that each sample counts for all modes it may be of."""
    means = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mixture = GaussianMixture(means.new_tensor([0.3, 0.7]), means, torch.ones_like(means))
    assert mode_width(mixture.sample(COUNT, generator_of(0, "evaluation")), mixture) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("width", [0.5, 0.1])
def test_one_narrow_mode(width):
    """Far from a second one, whose mass is exactly 0: no division by it."""
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


@pytest.mark.parametrize("method", ["db", "dag"])
def test_reward_with_the_prior_has_the_target_for_its_exponential(method):
    """Up to the target's normaliser, which is one number for all states."""
    problem, beta = PROBLEMS[16](), 0.6
    x = problem.mixture.sample(50, generator_of(0, "evaluation"))
    reward = told(method, problem.reward, problem.mixture, beta)
    assert isinstance(reward, RewardWithPrior)
    log_normaliser = beta * reward(x[:, :, None, None], ()) - problem.mixture.tilted(problem.reward, beta).log_prob(x)
    torch.testing.assert_close(log_normaliser, log_normaliser[:1].expand(50))
    assert reward(x[:, :, None, None].float(), ()).dtype == torch.float32


def test_reward_with_the_prior_needs_a_scale():
    problem = PROBLEMS[2]()
    assert told("residual-db", problem.reward, problem.mixture, 0.0) is problem.reward
    with pytest.raises(ValueError, match=r"objective\.beta = 0"):
        told("dag", problem.reward, problem.mixture, 0.0)
