"""With the exact flow, the objective is minimal at the solution of the problem, and only there."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastnabla.analytic.config import AnalyticConfig, settings
from fastnabla.analytic.experiment import Experiment
from fastnabla.analytic.training import measure, updates
from fastnabla.config.training_sections import RolloutConfig
from fastnabla.objective.balance import reward_weight, score_residual

ROLLOUT = RolloutConfig(trajectories=128, fraction=0.5, updates=1, batch=128)


class ExactPolicy(nn.Module):
    """``ε_ref − factor √(1 − ᾱ) (∇log p* − ∇log p_ref)``, with the interface of `MixtureNetwork`. 1 gives the target's ε."""

    def __init__(self, experiment: Experiment, factor: float) -> None:
        super().__init__()
        self.flow, self.perceptron, self.factor = experiment.flow, experiment.policy.network.perceptron, factor

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None, **_) -> tuple[Tensor]:
        alpha_bar, state = self.flow.alphas[timestep.long()], x.flatten(1).double()
        left = alpha_bar / self.flow.alphas[0]
        change = self.flow.target.score(state, left) - self.flow.reference.score(state, left)
        noise = (1 - alpha_bar).sqrt()[:, None]
        known = self.perceptron(x, timestep)[0] - self.factor * (noise * change).float().view_as(x)
        return (known + 0 * sum(parameter.sum() for parameter in self.perceptron.parameters()),)  # "trained"


def first_loss(steps: int, factor: float, **changes) -> float:
    config = settings("residual-db", steps=steps, exact_flow=True, rollout=ROLLOUT, updates=1, **changes)
    experiment = Experiment(config)
    experiment.policy.network.forward = ExactPolicy(experiment, factor).forward
    return next(iter(updates(experiment)))["loss_forward"]


@pytest.mark.slow
def test_the_target_s_score_solves_it_and_better_with_shorter_steps():
    """Up to the discretisation error, which falls with the square of the step size: 25 times less with five times as many
    steps. The pretrained policy, or one that moves half or twice as far or the other way, does not solve it."""
    coarse, fine = first_loss(20, 1.0), first_loss(100, 1.0)
    assert fine < coarse / 15
    for factor in (0.0, -1.0, 0.5, 2.0):
        assert first_loss(100, factor) > 10 * fine, factor


@pytest.mark.parametrize("prior_weight", [1.0, 0.5, 2.0])
def test_with_lambda_the_solution_is_the_target_at_beta_over_lambda(prior_weight: float):
    """The forward residual's mean over the policy's own x', from antithetic pairs, vanishes up to the discretisation error.
    It does not at half or twice the change."""
    objective = dataclasses.replace(AnalyticConfig().objective, beta=0.5, prior_weight=prior_weight)
    experiment = Experiment(settings("residual-db", steps=100, exact_flow=True, objective=objective, rollout=ROLLOUT))
    flow, table, generator = experiment.flow, experiment.table, torch.Generator().manual_seed(0)
    clean = experiment.target.sample(256, generator)
    noise, other = torch.randn(2, *clean.shape, dtype=torch.float64, generator=generator)

    def whole_flow(x: Tensor, timestep: Tensor, alpha_bar: Tensor) -> Tensor:
        weight = objective.beta * reward_weight(alpha_bar, objective.gamma)
        return flow(x, timestep, None) + (weight[:, None] * flow._reward_score(x, timestep, alpha_bar)).view_as(x)

    def left_over(factor: float, step: int) -> float:
        timestep = table.timestep[step].expand(len(clean))
        left = (flow.alphas[timestep.long()] / flow.alphas[0])[:, None]
        x = (left.sqrt() * clean + (1 - left).sqrt() * noise)[..., None, None]
        rows = table.rows(torch.full((len(x),), step), x)
        o_ref = experiment.policy.network.perceptron(x, timestep)[0]
        o = ExactPolicy(experiment, factor)(x, timestep, None)[0].detach()
        residual, total = torch.zeros_like(x), torch.zeros_like(x)
        for sign in (1, -1):
            x_next = rows.a * x + rows.b * o + sign * rows.sigma * other[..., None, None]
            h = whole_flow(x_next, rows.timestep_next, rows.alpha_bar_next.flatten())
            residual += score_residual(o, o_ref, x, x_next, rows, prior_weight) - h
            total += h
        return (residual.norm() / total.norm()).item()

    for step in (30, 60, 90):
        assert left_over(1.0, step) < 0.15, step
        assert left_over(0.5, step) > 0.4 and left_over(2.0, step) > 0.8, step
    # At the end ∇log F̃ is βγ∇r, and λ of the change of the score.
    x, first = clean[..., None, None], torch.zeros(len(clean), dtype=torch.int64)
    change = flow.target.score(clean, torch.ones(len(clean)).double()) - flow.reference.score(
        clean, torch.ones(len(clean)).double()
    )
    gradient = torch.autograd.functional.jacobian(lambda x: experiment.reward(x, ()).sum(), x).flatten(1)
    gamma = reward_weight(flow.alphas[first], objective.gamma)[:, None]
    torch.testing.assert_close(prior_weight * change, objective.beta * gamma * gradient, rtol=1e-6, atol=1e-9)


def test_lambda_of_zero_has_no_target():
    objective = dataclasses.replace(AnalyticConfig().objective, prior_weight=0.0)
    with pytest.raises(ValueError, match=r"objective\.prior_weight = 0\.0: no target is known with it"):
        Experiment(settings("residual-db", objective=objective))


@pytest.mark.slow
def test_the_target_s_score_solves_it_with_another_last_step():
    """Stable Diffusion's schedule, with the noise of the last steps raised."""
    sampler = {"schedule": "stable-diffusion", "spacing": "trailing", "min_sigma": 0.09}
    solved = first_loss(100, 1.0, **sampler)
    for factor in (0.0, 0.5, 2.0):
        assert first_loss(100, factor, **sampler) > 5 * solved, factor


@pytest.mark.slow
def test_it_is_learned_without_the_flow():
    def left(**changes) -> float:
        rollout = RolloutConfig(trajectories=128, fraction=0.5, updates=4, batch=128)
        config = settings("residual-db", updates=60, steps=20, width=64, samples=1000, rollout=rollout, **changes)
        subject = Experiment(config)
        before = measure(subject, subject.evaluation_samples())["sliced_wasserstein"]
        metrics = list(updates(subject))
        assert ("grad_norm_flow" in metrics[-1]) == (not config.exact_flow)
        return measure(subject, subject.evaluation_samples())["sliced_wasserstein"] / before

    published = dataclasses.replace(settings("residual-db").objective, reverse_target="policy")
    assert left(exact_flow=True) < 0.25 < left(objective=published)


def test_inner_epochs_need_no_more_of_the_reference():
    """A later one reads the cache, which has no product without a reverse residual."""
    rollout = RolloutConfig(trajectories=8, fraction=0.5, updates=1, epochs=2, batch=8)
    experiment = Experiment(settings("residual-db", steps=4, exact_flow=True, rollout=rollout, updates=2))
    first, second = list(updates(experiment))
    assert experiment.buffer.reference.product is None
    assert second["passes"] < first["passes"] and second["loss_forward"] < float("inf")


@pytest.mark.parametrize("changes", [{"method": "db"}, {"objective": {"reward_gradient": "terminal"}}], ids=str)
def test_it_is_refused_where_it_has_no_place(changes):
    default = AnalyticConfig()
    objective = dataclasses.replace(default.objective, **changes.get("objective", {}))
    with pytest.raises(
        ValueError, match=r"exact_flow = True: needs method = residual-db and objective\.reward_gradient = look"
    ):
        AnalyticConfig(method=changes.get("method", "residual-db"), objective=objective, exact_flow=True)


def test_it_leaves_the_policy_s_parameters_to_the_policy():
    experiment = Experiment(settings("residual-db", steps=4, exact_flow=True, rollout=ROLLOUT))
    x = torch.randn(3, 2, 1, 1, requires_grad=True)
    g = experiment.flow(x, torch.tensor([0, 500, 999]), torch.zeros(3, 1, 1))
    assert not list(experiment.flow.parameters()) and not g.requires_grad and g.shape == x.shape and g.dtype == x.dtype
