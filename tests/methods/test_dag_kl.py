"""DAG-KL against its definition in float64."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from fastnabla.config.method_sections import PolicyGradient
from fastnabla.methods.dag_kl import KullbackLeiblerStep
from fastnabla.methods.rollout_plan import RolloutPlan
from fastnabla.methods.zero_gradients import DRIVE
from fastnabla.objective.policy_gradient import leave_one_out_advantages
from fastnabla.objective.settings import Objective
from tests.checks import assert_gradients, randn
from tests.exact import Exact
from tests.golden import GoldenStep
from tests.methods.test_dag import PROMPTS, REWARDS, SETTINGS, residual_of
from tests.methods.test_out_of_memory import Limited
from tests.small_step import small_step

POLICY_GRADIENT = PolicyGradient(clip=0.005, advantage_clip=1.5)
TWO_UPDATES = RolloutPlan(updates=2)
"""The first is on-policy, the second is not."""


@functools.cache
def golden(on_policy: bool) -> GoldenStep:
    """Transitions that the present policy sampled, or one near it, of which some are beyond the clip."""
    g = small_step()
    rows, table = g.transitions, g.table
    row = table.rows(rows.step_index, rows.x)
    with torch.no_grad():
        u, c = g.policy(rows.x, row.timestep, rows.prompt).chunk(2)
    o = u + g.policy.guidance_scale * (c - u)
    if not on_policy:
        spread = torch.linspace(0, 0.2, len(rows)).view(-1, 1, 1, 1) * row.sigma / row.b.abs()
        o = o + spread * randn(*rows.x.shape, seed=1)
    x_next = row.a * rows.x + row.b * o + row.sigma * randn(*rows.x.shape, seed=2)
    rows = dataclasses.replace(rows, model_output=o, x_next=x_next, reward=REWARDS[rows.trajectory])
    return dataclasses.replace(g, transitions=rows)


def step_of(on_policy: bool, micro_batch: int = 100) -> KullbackLeiblerStep:
    g = golden(on_policy)
    networks = (g.policy, g.flow, g.decoder, g.reward, PROMPTS, g.table)
    step = KullbackLeiblerStep(POLICY_GRADIENT, *networks, Objective(**SETTINGS), micro_batch, "auto", TWO_UPDATES)
    step.update = 2 if on_policy else 3
    for parameter in step.parameters:
        parameter.grad = None
    return step


def advantages_of(returns: np.ndarray) -> np.ndarray:
    """Row by row."""
    differences = np.array([returns[i] - np.delete(returns, i).mean() for i in range(len(returns))])
    deviations = [
        np.delete(differences, i).std() ** 2 + np.delete(differences, i).mean() ** 2 for i in range(len(returns))
    ]
    return differences / np.sqrt(deviations)


@functools.cache
def expected(on_policy: bool):
    """Gradients, loss, and whether each row is clipped."""
    g = golden(on_policy)
    exact, objective = Exact(g), Objective(**SETTINGS)
    rows = list(zip(exact.rows(), g.transitions.trajectory, strict=True))
    residuals = [residual_of(exact, objective, row, trajectory, of_policy=False) for row, trajectory in rows]
    advantages = advantages_of(-torch.stack(residuals).detach().numpy()).clip(-1.5, 1.5)
    total, ratios = torch.stack(residuals).square().sum(), []
    for ((i, x, x_next, o_old, prompt), _), advantage in zip(rows, advantages, strict=True):
        o = exact.output(x, i, prompt)
        ratio = ((exact.log_prob(x, x_next, o, i) - exact.log_prob(x, x_next, o_old, i)) / x.numel()).exp()
        ratios.append(ratio.item())
        bounds = (1 - POLICY_GRADIENT.clip, 1 + POLICY_GRADIENT.clip)
        total = total + torch.maximum(-advantage * ratio, -advantage * ratio.clamp(*bounds))
        total = total + objective.trust_region_weight * (o - o_old).square().mean()
    loss = total / len(rows)
    clipped = np.abs(np.array(ratios) - 1) > POLICY_GRADIENT.clip
    return exact.gradients(g, loss), loss.detach(), clipped


@pytest.mark.slow
@pytest.mark.parametrize(("on_policy", "micro_batch"), [(True, 100), (False, 2)])
def test_gradients(on_policy: bool, micro_batch: int) -> None:
    gradients, loss, clipped = expected(on_policy)
    report = step_of(on_policy, micro_batch)(golden(on_policy).transitions)
    assert_gradients({name: gradient.clone() for name, gradient in golden(on_policy).gradients().items()}, gradients)
    torch.testing.assert_close(report.losses["loss"].double(), loss, rtol=1e-4, atol=1e-6)
    assert report.statistics["clipped"] == pytest.approx(clipped.mean())
    assert (0 < clipped.sum() < len(clipped)) != on_policy
    assert report.passes == ({"inner": 3, "last": 2} if on_policy else {"inner": 4, "last": 3})
    assert sum(report.counts.values()) == len(clipped) == len(report.rows["residual"])


@pytest.mark.slow
def test_parts_may_change_between_the_flow_and_the_policy() -> None:
    """Memory runs out, so the micro-batch is halved. Each row keeps its own advantage."""
    gradients, _, clipped = expected(True)
    step = step_of(on_policy=True)
    step.reward = Limited(step.reward, 2)
    report = step(golden(True).transitions)
    assert step.reward.failures and step.micro_batch <= 2 and sum(report.counts.values()) == len(clipped)
    assert_gradients(golden(True).gradients(), gradients)
    advantage = leave_one_out_advantages(-report.rows["residual"], POLICY_GRADIENT.advantage_clip)
    torch.testing.assert_close(report.rows["advantage"], advantage)


def test_replayed_rollouts_are_never_on_policy() -> None:
    step = step_of(on_policy=True)
    step.plan = dataclasses.replace(TWO_UPDATES, replay=1)
    assert step(golden(True).transitions).passes == {"inner": 4, "last": 3}


def test_rows_outside_the_clip_drive_the_gradient_if_they_have_one() -> None:
    ratio, advantage = torch.tensor([0.9, 1.1]), torch.tensor([0.7, -0.3])
    assert step_of(True)._signals({"ratio": ratio, "advantage": advantage})[DRIVE] == advantage[0]
    assert step_of(True)._signals({"ratio": ratio, "advantage": -advantage})[DRIVE] == 0


def test_advantages_leave_one_out() -> None:
    returns = randn(7, seed=3).double()
    exact = advantages_of(returns.numpy())
    assert np.abs(exact).max() > 1
    np.testing.assert_allclose(leave_one_out_advantages(returns, 100.0), exact, rtol=1e-6)
    np.testing.assert_allclose(leave_one_out_advantages(returns, 1.0), exact.clip(-1, 1), rtol=1e-6)


def test_returns_that_are_not_finite_or_all_equal_have_no_advantage() -> None:
    returns = randn(7, seed=3)
    spoilt = returns.clone()
    spoilt[2] = float("nan")
    advantages = leave_one_out_advantages(spoilt, 5.0)
    others = torch.arange(7) != 2
    assert advantages[2] == 0
    assert torch.equal(advantages[others], leave_one_out_advantages(returns[others], 5.0))
    assert not leave_one_out_advantages(torch.full((3,), 0.1), 5.0).any()
    assert leave_one_out_advantages(torch.tensor([0.3]), 5.0).abs() <= 5.0


def test_the_expected_gradient_is_that_of_the_divergence() -> None:
    """Of KL(N(μ, σ²) ‖ N(m, s²)) in 1-D, over the returns' deviation, to five standard errors."""
    mean, sigma = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.8))
    policy, target = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(-0.2, 1.3)
    exact = torch.autograd.grad(torch.distributions.kl_divergence(policy, target), (mean, sigma))
    x = mean.detach() + sigma.detach() * randn(200_000, seed=4).double()
    returns = (target.log_prob(x) - policy.log_prob(x)).detach()
    terms = -leave_one_out_advantages(returns, 100.0) * policy.log_prob(x)
    for parameter, gradient in zip((mean, sigma), exact, strict=True):
        (estimate,) = torch.autograd.grad(terms.mean(), parameter, retain_graph=True)
        standard = (x - 0.7) / 0.64 if parameter is mean else (x - 0.7) ** 2 / 0.8**3 - 1 / 0.8
        error = (leave_one_out_advantages(returns, 100.0) * standard).std() / len(x) ** 0.5
        assert abs(estimate - gradient / returns.std()) < 5 * error
        assert abs(gradient / returns.std()) > 20 * error


@pytest.mark.parametrize("replay", [0, 1])
def test_plan_of_rollouts(replay: int) -> None:
    """Five rollouts of two updates each: β rises by rollout and is whole from the middle of the run."""
    plan = RolloutPlan(rollouts=5, updates=2, replay=replay)
    assert [plan.annealing(update) for update in range(10)] == [0, 0, 0.4, 0.4, 0.8, 0.8, 1, 1, 1, 1]
    assert [plan.is_on_policy(update) for update in range(4)] == [not replay, False] * 2
    assert plan.on_policy_share == (0 if replay else 0.5)
