"""The residual whose target follows the reference: against autograd, and what it is the gradient of, in float64.

The derivation is checked in one dimension, where expectations are Gauss–Hermite sums.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from fastnabla.objective.balance import forward_balance, reverse_cotangent, reverse_residual
from fastnabla.objective.reference_target import next_flow_score, reference_balance, reference_cotangent
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows
from tests.checks import ddim_table, randn
from tests.exact import grad, guided
from tests.objective.test_balance import EXACT, SHAPE, STEPS, mean_square, network

TABLE = ddim_table(10, eta=0.8)
LAST = len(TABLE) - 1


# The residual, by autograd


@pytest.mark.parametrize("gamma", ["alpha_bar", "sqrt_alpha_bar", "constant"])
@pytest.mark.parametrize("weighting", ["score", "sigma"])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("reward_gradient", ["lookahead", "lookahead_detached", "terminal"])
def test_residual(reward_gradient, guidance, weighting, gamma):
    """``g(x) + ∇R(x) − (∂μ_ref/∂x)ᵀ h(x')``, with R a nonlinear function of the clean prediction; one row is a last one."""
    x = randn(*SHAPE, dtype=torch.float64).requires_grad_()
    rows = TABLE.rows(STEPS, x)
    flow, flow_next, reward_next, end_score = (randn(*SHAPE, seed=seed, dtype=torch.float64) for seed in range(1, 5))
    flow.requires_grad_()
    flow_next.requires_grad_()
    output = network(x, guidance, seed=5)
    o = guided(output, guidance)
    power = {"alpha_bar": 1.0, "sqrt_alpha_bar": 0.5, "constant": 0.0}[gamma]

    def prediction_reward(o: Tensor) -> Tensor:
        return (rows.c * x + rows.d * o).cos().sum()

    if reward_gradient == "terminal":
        reward = end_score
    else:
        reward = grad(prediction_reward(o if reward_gradient == "lookahead" else o.detach()), x, retain_graph=True)
    inner = torch.tensor([1, 1, 0]).view(3, 1, 1, 1)
    h = 2.0 * rows.alpha_bar_next**power * reward_next + inner * flow_next
    (carried,) = torch.autograd.grad(rows.a * x + rows.b * o, x, h.detach(), retain_graph=True)
    residual = flow + 2.0 * rows.alpha_bar**power * reward - carried
    expected = mean_square(residual * (rows.sigma if weighting == "sigma" else 1))

    objective = Objective(beta=2.0, gamma=gamma, weighting=weighting)
    clean = (rows.c * x + rows.d * o).detach().requires_grad_()
    pixel = grad(clean.cos().sum(), clean)
    through = pixel if reward_gradient == "lookahead" else None
    settings = {"objective": objective, "guidance_scale": guidance}
    cotangent = reference_cotangent(output, rows, reward_next, flow_next, through, **settings)
    assert not cotangent.requires_grad and cotangent.shape == output.shape
    (vjp,) = torch.autograd.grad(output, x, cotangent)
    scores = (end_score, None) if reward_gradient == "terminal" else (None, pixel)
    loss = reference_balance(vjp, rows, flow, reward_next, flow_next, *scores, objective=objective)

    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(next_flow_score(rows, reward_next, flow_next, objective), h, **EXACT)
    row_weights = randn(3, seed=6, dtype=torch.float64)
    (actual,) = torch.autograd.grad((row_weights * loss).sum(), flow)
    torch.testing.assert_close(actual, torch.autograd.grad((row_weights * expected).sum(), flow)[0], **EXACT)
    assert torch.autograd.grad(expected.sum() + loss.sum(), flow_next, allow_unused=True) == (None,)


@pytest.mark.parametrize("guidance", [None, 5.0])
def test_last_rows_do_not_see_the_next_flow(guidance):
    """Not even a NaN; without a flow the result is the same."""
    x = randn(*SHAPE, dtype=torch.float64)
    rows = TABLE.rows(torch.full((3,), LAST), x)
    objective, reward = Objective(beta=2.0), randn(*SHAPE, seed=1, dtype=torch.float64)
    output = network(x, guidance, seed=5)
    for flow_next in (torch.full_like(x, float("nan")), randn(*SHAPE, seed=2, dtype=torch.float64)):
        given, none = (
            reference_cotangent(output, rows, reward, g, x, objective=objective, guidance_scale=guidance)
            for g in (flow_next, None)
        )
        assert torch.equal(given, none)
        given, none = (
            reference_balance(x, rows, x, reward, g, None, x, objective=objective) for g in (flow_next, None)
        )
        assert torch.equal(given, none) and bool((given > 0).all())


# One dimension: N values of x' for one x

NODES, WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
Network = Callable[[Tensor], Tensor]


def draws(mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Gauss–Hermite nodes `[N, 1]` of a normal distribution; their `WEIGHTS` are those of the expectation."""
    return (mean + std * NODES).view(-1, 1)


def expectation(values: Tensor) -> Tensor:
    return (WEIGHTS.view(-1, 1) * values).sum()


def rows_of(i: int) -> TransitionRows:
    """N rows of step i."""
    return TABLE.rows(torch.full((len(NODES),), i), NODES.view(-1, 1))


def reference_residual(
    i: int, x: float, reference: Network, flow: Tensor, scores: tuple, objective: Objective
) -> Tensor:
    """The residual `[N, 1]` of transitions from x at step i, from the gradient of `reference_balance`.

    Args:
        flow: g(x) `[N, 1]`.
        scores: ∇r(x') and g(x') `[N, 1]`, and ∂r/∂x̂0 at the prediction from x.
    """
    rows, state = rows_of(i), torch.full((len(NODES), 1), x, dtype=torch.float64, requires_grad=True)
    output, (reward_next, flow_next, pixel) = reference(state), scores
    flow = flow.detach().requires_grad_()
    cotangent = reference_cotangent(
        output, rows, reward_next, flow_next, pixel, objective=objective, guidance_scale=None
    )
    (vjp,) = torch.autograd.grad(output, state, cotangent)
    loss = reference_balance(vjp, rows, flow, reward_next, flow_next, None, pixel, objective=objective)
    return torch.autograd.grad(loss.sum(), flow)[0] / 2


@pytest.mark.parametrize("i", [0, 4, 8])
def test_target_is_unbiased(i):
    """With any flow at x' and ``F̃(x) = E_ref[F̃(x')|x]``, the target's mean over ``P*(x'|x) ∝ P_ref(x'|x) F̃(x')`` is
    ``∇log F̃(x)``; here the network and log F̃ are nonlinear."""

    def reference(x: Tensor) -> Tensor:
        return (1.3 * x + 0.2).sin() + 0.4 * x

    def log_flow_next(x_next: Tensor) -> Tensor:
        return (0.9 * x_next).sin() - 0.2 * x_next**2

    x = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    row = TABLE.rows(torch.tensor([i]), x.detach().view(1, 1))
    x_next = draws(row.a.view(()) * x + row.b.view(()) * reference(x), row.sigma.view(()))
    score = grad(expectation(log_flow_next(x_next).exp()).log(), x, retain_graph=True)

    x_next = x_next.detach().requires_grad_()
    density = log_flow_next(x_next).exp().detach()  # of P* relative to P_ref
    h = grad(log_flow_next(x_next).sum(), x_next)
    zero = torch.zeros_like(h)
    target = -reference_residual(i, x.item(), reference, zero, (zero, h, zero), Objective(beta=2.0))
    mean = expectation(density * target) / expectation(density)
    torch.testing.assert_close(mean, score, **EXACT)


# A linear Gaussian sampler with a quadratic reward: all flows are known

SLOPE, INTERCEPT = torch.linspace(-0.3, 0.5, LAST + 1).double(), torch.linspace(0.4, -0.2, LAST + 1).double()
"""The pretrained network at step i: ``o = slope x + intercept``."""
GOAL, START = 0.7, -0.4
"""The reward is ``r(x_T) = −(x_T − goal)²/2``; START is the x of the transitions."""


def reference_at(i: int) -> Network:
    return lambda x: SLOPE[i] * x + INTERCEPT[i]


def reward_slope(clean: Tensor) -> Tensor:
    return GOAL - clean


def reference_step(i: int) -> tuple[Tensor, Tensor]:
    """m and n of the mean ``μ_ref = m x + n``."""
    return TABLE.a[i] + TABLE.b[i] * SLOPE[i], TABLE.b[i] * INTERCEPT[i]


def exact_flow(beta: float) -> list[tuple[Tensor, Tensor]]:
    """(A, B) by state 0..T, with ``∇log F̃(x) = B − A x``, from ``F̃(x_T) = e^{βr}`` and ``F̃(x) = E_ref[F̃(x')|x]``."""
    flows = [(torch.tensor(beta, dtype=torch.float64), torch.tensor(beta * GOAL, dtype=torch.float64))]
    for i in reversed(range(LAST + 1)):
        (m, n), (curvature, slope) = reference_step(i), flows[0]
        scale = m / (1 + TABLE.sigma[i] ** 2 * curvature)
        flows.insert(0, (scale * m * curvature, scale * (slope - n * curvature)))
    return flows


def flow_score(flow: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    curvature, slope = flow
    return slope - curvature * x


def tilted_mean(i: int, flow_next: tuple[Tensor, Tensor]) -> Tensor:
    """Mean of ``P*(x'|x) ∝ P_ref(x'|x) F̃(x')`` from x = START."""
    (m, n), (curvature, slope) = reference_step(i), flow_next
    return (m * START + n + TABLE.sigma[i] ** 2 * slope) / (1 + TABLE.sigma[i] ** 2 * curvature)


def look_ahead(i: int, x_next: Tensor, beta: float) -> Tensor:
    """∇R(x') `[N, 1]`, with γ = 1, at the reference's prediction from x'."""
    if i == LAST:
        return beta * reward_slope(x_next)
    c, d = TABLE.c_next[i], TABLE.d_next[i]
    return beta * reward_slope(c * x_next + d * reference_at(i + 1)(x_next)) * (c + d * SLOPE[i + 1])


def scores_of(i: int, x_next: Tensor, h: Tensor, beta: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """∇r(x') and g(x') whose sum, scaled, is h, and ∂r/∂x̂0 at the prediction from START; without g in the last row."""
    reward = look_ahead(i, x_next, beta)
    clean = TABLE.c[i] * START + TABLE.d[i] * reference_at(i)(torch.full_like(x_next, START))
    return reward / beta, None if i == LAST else h - reward, reward_slope(clean)


def exact_g(i: int, score: Tensor, pixel: Tensor, beta: float) -> Tensor:
    """g(x) `[N, 1]` at START for the flow score `score`."""
    return score - beta * (TABLE.c[i] + TABLE.d[i] * SLOPE[i]) * pixel


@pytest.mark.parametrize("i", range(LAST + 1))
def test_exact_flow(i):
    """The closed form is the score of ``E_ref[F̃(x')|x]``."""
    flows, x = exact_flow(3.0), torch.tensor(START, dtype=torch.float64, requires_grad=True)
    (m, n), (curvature, slope) = reference_step(i), flows[i + 1]
    x_next = draws(m * x + n, TABLE.sigma[i])
    log_flow = expectation((slope * x_next - curvature * x_next**2 / 2).exp()).log()
    torch.testing.assert_close(grad(log_flow, x), flow_score(flows[i], x.detach()), **EXACT)


@pytest.mark.parametrize("i", range(LAST + 1))
def test_the_exact_flow_has_no_residual(i):
    """In the mean over the exact tilted transitions, at every step, the last included. Over the pretrained model's it has."""
    beta, flows = 3.0, exact_flow(3.0)
    std = (1 / TABLE.sigma[i] ** 2 + flows[i + 1][0]).rsqrt()
    score = flow_score(flows[i], torch.tensor(START, dtype=torch.float64))
    (m, n), means = reference_step(i), []
    for x_next in (draws(tilted_mean(i, flows[i + 1]), std), draws(m * START + n, TABLE.sigma[i])):
        scores = scores_of(i, x_next, flow_score(flows[i + 1], x_next), beta)
        g = exact_g(i, score, scores[-1], beta)
        objective = Objective(beta=beta, gamma="constant")
        means.append(expectation(reference_residual(i, START, reference_at(i), g, scores, objective)))
    assert abs(means[0]) < 1e-9
    assert abs(means[1]) > 1e-4


@pytest.mark.parametrize("prior_weight", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("i", range(LAST + 1))
def test_fixed_point_for_a_prior_weight(i, prior_weight):
    """λ and β train the policy that 1 and β/λ train, on-policy: its mean forward gradient and its mean reverse residual are
    both 0 at the exact flow score of β/λ, times λ. With that of β, and λ ≠ 1, neither is."""
    beta = 3.0
    objective = Objective(beta=beta, gamma="constant", prior_weight=prior_weight)
    results = []
    for factor in (prior_weight, 1.0):
        flows = exact_flow(beta / factor)
        mean = tilted_mean(i, flows[i + 1])
        o = (mean - TABLE.a[i] * START) / TABLE.b[i]
        x_next, rows = draws(mean, TABLE.sigma[i]), rows_of(i)
        x = torch.full_like(x_next, START)
        h = factor * flow_score(flows[i + 1], x_next)
        scores = scores_of(i, x_next, h, beta)
        output = o * torch.ones_like(x).requires_grad_()
        forward = forward_balance(
            output, reference_at(i)(x), x, x_next, rows, *scores[:2], objective=objective, guidance_scale=None
        )
        g = exact_g(i, factor * flow_score(flows[i], x), scores[-1], beta)
        results.append(
            (
                expectation(torch.autograd.grad(forward.loss.sum(), output)[0]) * TABLE.sigma[i] ** 2,
                expectation(reference_residual(i, START, reference_at(i), g, scores, objective)),
            )
        )
    assert max(map(abs, results[0])) < 1e-9
    assert prior_weight == 1.0 or abs(results[1][0]) > 1e-4


# The published reverse residual


@pytest.mark.parametrize("guidance", [None, 5.0])
def test_published_target(guidance):
    """Where the forward condition holds, the published target is this one plus ``(∂μ_θ/∂x − ∂μ_ref/∂x)ᵀ s_θ``."""
    x = randn(*SHAPE, dtype=torch.float64).requires_grad_()
    rows = TABLE.rows(torch.tensor([1, 6, 8]), x)
    output, output_ref = network(x, guidance, seed=3), network(x, guidance, seed=4)
    mean, mean_ref = (rows.a * x + rows.b * guided(pair, guidance) for pair in (output, output_ref))
    x_next = (mean + rows.sigma * randn(*SHAPE, seed=5, dtype=torch.float64)).detach()
    objective = Objective(beta=2.0)
    settings = {"objective": objective, "guidance_scale": guidance}
    reward_next, flow, pixel = (randn(*SHAPE, seed=seed, dtype=torch.float64) for seed in (6, 7, 8))
    h = ((mean - mean_ref) / rows.sigma**2).detach()  # s_θ − s_ref
    flow_next = h - 2.0 * rows.alpha_bar_next * reward_next

    vjps = []
    for pair in (output, output_ref):
        cotangent = reverse_cotangent(pair, x, x_next, rows, **settings)
        vjps += torch.autograd.grad(pair, x, cotangent, retain_graph=True)
    pairs = (output.detach(), output_ref.detach())
    published = reverse_residual(*vjps, rows, flow, None, pixel, pairs, **settings)

    cotangent = reference_cotangent(output_ref, rows, reward_next, flow_next, **settings)
    (vjp,) = torch.autograd.grad(output_ref, x, cotangent, retain_graph=True)
    flow.requires_grad_()
    loss = reference_balance(vjp, rows, flow, reward_next, flow_next, None, pixel, objective=objective)
    residual = torch.autograd.grad(loss.sum(), flow)[0] * flow[0].numel() / 2

    end = x_next.clone().requires_grad_()
    score = grad(Normal(mean.detach(), rows.sigma).log_prob(end).sum(), end)
    (difference,) = torch.autograd.grad(mean - mean_ref, x, score)
    assert difference.abs().max() > 0.1
    torch.testing.assert_close(residual - published.detach(), difference, **EXACT)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_published_target_off_policy(shift):
    """The difference has mean 0 if the policy itself sampled x', and is a bias if another one did, `shift` σ away."""
    i, x = 4, torch.full((len(NODES), 1), 0.6, dtype=torch.float64, requires_grad=True)
    rows = rows_of(i)
    output, output_ref = (1.3 * x + 0.2).sin(), 0.4 * x
    mean, mean_ref = (rows.a * x + rows.b * o for o in (output, output_ref))
    x_next = (mean + rows.sigma * (shift + NODES.view(-1, 1))).detach()
    h, zero = ((mean - mean_ref) / rows.sigma**2).detach(), torch.zeros_like(x_next)
    settings = {"objective": Objective(beta=2.0), "guidance_scale": None}
    vjps = [
        torch.autograd.grad(o, x, reverse_cotangent(o, x, x_next, rows, **settings), retain_graph=True)[0]
        for o in (output, output_ref)
    ]
    published = reverse_residual(
        *vjps, rows, zero, None, zero, (output.detach(), output_ref.detach()), **settings
    ).detach()
    residual = reference_residual(i, 0.6, lambda state: 0.4 * state, zero, (zero, h, zero), settings["objective"])
    jacobians = [torch.autograd.grad(m.sum(), x, retain_graph=True)[0][0, 0] for m in (mean, mean_ref)]
    bias = -(jacobians[0] - jacobians[1]) * shift / TABLE.sigma[i]
    torch.testing.assert_close(expectation(residual - published), bias, **EXACT)
    assert shift == 0 or abs(bias) > 0.1
