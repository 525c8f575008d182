"""The reward that includes the prior."""

import pytest
import torch

from fastnabla.analytic.prior import RewardWithPrior, reward_for_method
from fastnabla.analytic.problems import PROBLEMS
from fastnabla.utils.seeding import generator_of


@pytest.mark.parametrize("method", ["db", "dag", "dag-kl"])
def test_reward_with_the_prior_has_the_target_for_its_exponential(method):
    """Up to the target's normaliser, which is the same for all states."""
    problem, beta = PROBLEMS[16](), 0.6
    x = problem.mixture.sample(50, generator_of(0, "evaluation"))
    reward = reward_for_method(method, problem.reward, problem.mixture, beta)
    assert isinstance(reward, RewardWithPrior)
    log_normaliser = beta * reward(x[:, :, None, None], ()) - problem.mixture.tilted(problem.reward, beta).log_prob(x)
    torch.testing.assert_close(log_normaliser, log_normaliser[:1].expand(50))
    assert reward(x[:, :, None, None].float(), ()).dtype == torch.float32


def test_reward_with_the_prior_needs_a_scale():
    problem = PROBLEMS[2]()
    assert reward_for_method("residual-db", problem.reward, problem.mixture, 0.0) is problem.reward
    with pytest.raises(ValueError, match=r"objective\.beta = 0"):
        reward_for_method("dag", problem.reward, problem.mixture, 0.0)
