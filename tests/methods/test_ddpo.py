"""DDPO against its definition in float64."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from fastnabla.config.method_sections import PolicyGradient
from fastnabla.methods.ddpo import PolicyGradientStep, PromptStatistics
from fastnabla.methods.zero_gradients import DRIVE
from fastnabla.objective.policy_gradient import clipped_surrogate, is_flat
from fastnabla.trajectories.draws import DRAWS, expected_draws
from tests.checks import BACKENDS, assert_gradients, randn
from tests.exact import Exact
from tests.golden import GoldenStep
from tests.small_step import small_step

EXPECTED = expected_draws("stratified", 50, 2)
REWARDS = torch.tensor([0.3, -1.2, 2.0])
SETTINGS = PolicyGradient(clip=0.01, advantage_clip=1.0)


@functools.cache
def golden() -> GoldenStep:
    """Transitions that a policy near the present one sampled, some of them beyond the clip."""
    g = small_step().without_flow()
    rows, table = g.transitions, g.table
    row = table.rows(rows.step_index, rows.x)
    with torch.no_grad():
        u, c = g.policy(rows.x, row.timestep, rows.prompt).chunk(2)
    spread = torch.linspace(0, 0.4, len(rows)).view(-1, 1, 1, 1) * row.sigma / row.b.abs()
    o_old = u + g.policy.guidance_scale * (c - u) + spread * randn(*rows.x.shape, seed=1)
    x_next = row.a * rows.x + row.b * o_old + row.sigma * randn(*rows.x.shape, seed=2)
    rows = dataclasses.replace(rows, model_output=o_old, x_next=x_next, reward=REWARDS[rows.trajectory])
    return dataclasses.replace(g, transitions=rows)


def step_of(micro_batch: int = 100, backend: str = "auto", settings: PolicyGradient = SETTINGS) -> PolicyGradientStep:
    return PolicyGradientStep(golden().policy, golden().table, 3, settings, EXPECTED, micro_batch, backend)


def run(step: PolicyGradientStep, *calls):
    for parameter in step.parameters:
        parameter.grad = None
    reports = [step(*call) for call in calls]
    return reports[0], {name: gradient.clone() for name, gradient in golden().gradients().items()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("micro_batch", [100, 2])
def test_gradients(micro_batch, backend):
    report, gradients = run(step_of(micro_batch, backend), (golden().transitions,))

    exact, loss, ratios = Exact(golden()), 0, []
    rewards = REWARDS.numpy().astype(np.float64)
    advantages = np.clip((rewards - rewards.mean()) / rewards.std(), -1, 1)
    for (i, x, x_next, o_old, prompt), trajectory in zip(exact.rows(), golden().transitions.trajectory, strict=True):
        new, old = (exact.log_prob(x, x_next, o, i) for o in (exact.output(x, i, prompt), o_old))
        ratio, advantage = ((new - old) / x.numel()).exp(), advantages[trajectory]
        ratios.append(ratio.item())
        surrogate = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - SETTINGS.clip, 1 + SETTINGS.clip))
        loss = loss + surrogate / EXPECTED[i] / (3 * 50)
    clipped = np.abs(np.array(ratios) - 1) > SETTINGS.clip
    assert 0 < clipped.sum() < len(clipped)
    assert_gradients(gradients, exact.gradients(golden(), loss))
    torch.testing.assert_close(report.losses["loss"].double(), loss.detach(), rtol=1e-5, atol=0)
    assert report.statistics["clipped"] == pytest.approx(clipped.mean())
    assert report.passes == {"inner": 2, "last": 2}


def test_surrogate_is_the_reinforce_gradient_at_the_policy_that_sampled():
    log_ratio, advantage = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.tensor([-2.0, 0.5, 1, 3])
    (gradient,) = torch.autograd.grad(clipped_surrogate(log_ratio, advantage, 1e-4).sum(), log_ratio)
    assert torch.equal(gradient, -advantage.double())


@pytest.mark.parametrize(("log_ratio", "advantage", "moves"), [(0.2, 1, 0), (-0.2, 1, 1), (0.2, -1, 1), (-0.2, -1, 0)])
def test_clipping_stops_moves_away_alone(log_ratio, advantage, moves):
    log_ratio, advantage = torch.tensor([log_ratio], requires_grad=True), torch.tensor([float(advantage)])
    loss = clipped_surrogate(log_ratio, advantage, 0.1).sum()
    assert bool(torch.autograd.grad(loss, log_ratio)[0]) == bool(moves)
    assert is_flat(log_ratio.exp(), advantage, 0.1).item() == (not moves)


def test_rows_outside_the_clip_drive_the_gradient_if_they_have_one():
    """A zero gradient is then an error; no row drives it if all are flat."""
    ratio, advantage = torch.tensor([0.9, 1.1]), torch.tensor([0.7, -0.3])
    assert step_of()._signals({"ratio": ratio, "advantage": advantage})[DRIVE] == advantage[0]
    assert step_of()._signals({"ratio": ratio, "advantage": -advantage})[DRIVE] == 0


def test_calls_add_up():
    """Where advantages do not depend on which call saw the rewards: prompts with a history."""
    rows = golden().transitions
    settings = PolicyGradient(window=8, min_count=1)
    history = {"rewards": randn(3, 8, dtype=torch.float64), "seen": torch.full((3,), 8)}
    whole, parts = step_of(settings=settings), step_of(settings=settings)
    for step in (whole, parts):
        step.load_state_dict(history)
    _, expected = run(whole, (rows,))
    first = rows.trajectory == 0
    _, gradients = run(parts, (rows[first], 3), (rows[~first], 3))
    assert_gradients(gradients, expected)
    assert all(torch.equal(parts.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_rewards_must_be_there():
    rows = golden().transitions
    with pytest.raises(ValueError, match=r"no trajectory has a reward: set buffer\.reward"):
        step_of()(dataclasses.replace(rows, reward=torch.full((len(rows),), float("nan"))))


def test_an_update_without_a_finite_reward_has_no_finite_loss():
    rows = golden().transitions
    reward = torch.where(rows.trajectory == 1, float("nan"), float("inf"))
    step = step_of()
    report = step(dataclasses.replace(rows, reward=reward))
    assert report.losses["loss"].isnan() and report.rows["advantage"].isnan().all()
    assert not step.statistics.seen.any()


def test_a_reward_that_is_not_finite_has_no_advantage():
    rows = golden().transitions
    reward = torch.where(rows.trajectory == 1, float("inf"), rows.reward)
    step = step_of()
    report = step(dataclasses.replace(rows, reward=reward))
    at = report.rows["prompt"] == 1  # in these rows trajectory and prompt have the same number
    assert not report.rows["advantage"][at].any() and report.rows["advantage"][~at].all()
    assert step.statistics.seen.tolist() == [1, 0, 1]


def test_prompt_statistics():
    """Against the windows kept as lists."""
    statistics, windows = PromptStatistics(prompts=3, window=4, min_count=3), {p: [] for p in range(3)}
    generator = np.random.default_rng(0)
    for _ in range(6):
        prompt, reward = generator.integers(0, 3, 5), generator.normal(size=5)
        for p, r in zip(prompt, reward, strict=True):
            windows[p] = [*windows[p], r][-4:]
        expected = []
        for p, r in zip(prompt, reward, strict=True):
            values = windows[p] if len(windows[p]) >= 3 else reward
            expected.append((r - np.mean(values)) / (np.std(values) + 1e-6))
        actual = statistics.advantages(torch.from_numpy(prompt), torch.from_numpy(reward))
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9)

    resumed = PromptStatistics(3, 4, 3)
    resumed.load_state_dict(statistics.state_dict())
    prompt, reward = torch.tensor([0, 2]), torch.tensor([1.0, -1.0])
    assert torch.equal(resumed.advantages(prompt, reward), statistics.advantages(prompt, reward))
    with pytest.raises(ValueError, match=r"expected \(2, 4\)"):
        PromptStatistics(2, 4, 3).load_state_dict(statistics.state_dict())


@pytest.mark.parametrize("draw", DRAWS)
def test_expected_draws(draw):
    """Mean counts of 20,000 trajectories, to five standard errors of a Bernoulli variable (at most 0.5/√20000)."""
    count, num_steps, draws = 20_000, 8, 4
    steps = DRAWS[draw](0, 0, count, num_steps, draws)
    counts = torch.bincount(steps.flatten(), minlength=num_steps) / count
    expected = expected_draws(draw, num_steps, draws)
    assert expected.sum() == pytest.approx(draws + 1)
    assert (counts - expected).abs().max() < 5 * 0.5 / count**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, r"policy_gradient\.clip = 0\.0: must be positive"),
        ({"advantage_clip": float("inf")}, r"advantage_clip = inf"),
        ({"window": 1}, r"window = 1: must be at least 2"),
        ({"min_count": 0}, r"min_count = 0: must be at least 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**settings)
