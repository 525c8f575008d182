"""DAG-DB against its definition in float64."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from fastnabla.methods.dag import DetailedBalanceStep
from fastnabla.methods.rollout_plan import RolloutPlan
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionTable
from tests.checks import BACKENDS, assert_gradients, ddim_table, randn
from tests.exact import Exact, gamma_of
from tests.golden import GoldenStep
from tests.small_step import small_step

REWARDS = torch.tensor([0.3, -1.2, 2.0])
PROMPTS = [str(i) for i in range(3)]
SETTINGS = {"beta": 500.0, "trust_region_weight": 0.5}


@functools.cache
def golden() -> GoldenStep:
    """Transitions that the policy may have sampled: log-densities of the size they have in a run."""
    g = small_step()
    rows = g.transitions
    row = g.table.rows(rows.step_index, rows.x)
    x_next = row.a * rows.x + row.b * rows.model_output + row.sigma * randn(*rows.x.shape, seed=2)
    return dataclasses.replace(g, transitions=dataclasses.replace(rows, x_next=x_next, reward=REWARDS[rows.trajectory]))


def step_of(micro_batch: int = 100, backend: str = "auto", table: TransitionTable | None = None, **settings):
    g = golden()
    networks = (g.policy, g.flow, g.decoder, g.reward, PROMPTS, table or g.table)
    return DetailedBalanceStep(*networks, Objective(**SETTINGS | settings), micro_batch, backend)


def run(step: DetailedBalanceStep):
    for parameter in step.parameters:
        parameter.grad = None
    report = step(golden().transitions)
    return report, {name: gradient.clone() for name, gradient in golden().gradients().items()}


def residual_of(exact: Exact, objective: Objective, row: tuple, trajectory: Tensor, of_policy: bool = True) -> Tensor:
    """δ of one of `exact.rows`, a scalar. Its gradient flows to the policy only if `of_policy`."""
    i, x, x_next, _, prompt = row
    o = exact.output(x, i, prompt)

    def log_flow(state: Tensor, o: Tensor, after: bool) -> Tensor:
        gamma = gamma_of(exact.at("alpha_bar_next" if after else "alpha_bar", i), objective.gamma)
        reward = exact.reward(exact.clean(state, o, i, after), prompt).detach()
        return objective.beta * gamma * reward + exact.flow_at(state, i, prompt, after).sum()

    if i == len(exact.table) - 1:
        log_flow_next = objective.beta * gamma_of(exact.at("alpha_bar_next", i), objective.gamma) * REWARDS[trajectory]
    else:
        log_flow_next = log_flow(x_next, exact.output(x_next, i, prompt, after=True), True)
    log_prob = exact.log_prob(x, x_next, o, i)
    log_prob = log_prob if of_policy else log_prob.detach()
    sides = log_flow(x, o, False) + log_prob, log_flow_next + exact.log_noising(x, x_next, i)
    return ((sides[0] - sides[1]) / x.numel()).sum()


def expected_loss(exact: Exact, objective: Objective) -> Tensor:
    total = 0
    for row, trajectory in zip(exact.rows(), golden().transitions.trajectory, strict=True):
        i, x, _, o_old, prompt = row
        trust = (exact.output(x, i, prompt) - o_old).square().mean()
        total = total + residual_of(exact, objective, row, trajectory).square()
        total = total + objective.trust_region_weight * trust
    return total / len(exact.transitions)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("micro_batch", "gamma"), [(100, "constant"), (2, "alpha_bar")])
def test_gradients(micro_batch, gamma, backend):
    step = step_of(micro_batch, backend, gamma=gamma)
    report, gradients = run(step)
    exact = Exact(golden())
    loss = expected_loss(exact, step.objective)
    assert_gradients(gradients, exact.gradients(golden(), loss))
    torch.testing.assert_close(report.losses["loss"].double(), loss.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(report.losses["balance"], report.rows["residual"].square().mean())
    assert report.passes == {"inner": 3, "last": 2}


def test_an_annealed_beta_is_that_of_the_rollout():
    """The third of eight rollouts has half of β, to the same bits as a run with that β."""
    annealed = step_of(beta_schedule="linear")
    annealed.plan, annealed.update = RolloutPlan(rollouts=8, updates=2), 5
    report, gradients = run(annealed)
    half, expected = run(step_of(beta=SETTINGS["beta"] / 2))
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert report.statistics["beta"] == 250 and "beta" not in half.statistics


def test_the_sampler_must_be_ddpm():
    with pytest.raises(ValueError, match=r"method = 'dag'.*sampler\.eta = 1"):
        step_of(table=ddim_table(50, eta=0.5))
