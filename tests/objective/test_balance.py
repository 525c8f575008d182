"""The balance residuals against float64 autograd of the densities they come from."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from fastnabla.objective.balance import (
    forward_balance,
    reverse_balance,
    reverse_cotangent,
    reverse_residual,
    reward_weight,
    score_residual,
)
from fastnabla.objective.gaussian import gaussian_log_prob, guide, guided_step, step_score, unguide
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows
from tests.checks import ddim_table, randn, relative_error
from tests.exact import guided

SHAPE = (3, 2, 4, 5)
STEPS = torch.tensor([1, 6, 9])
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def network(x: Tensor, guidance: float | None, seed: int) -> Tensor:
    """A nonlinear output, pair or not, that mixes the entries of a row."""
    copies = 1 if guidance is None else 2
    weights = 0.3 * randn(copies, x[0].numel(), x[0].numel(), seed=seed, dtype=x.dtype)
    return torch.cat([(x.flatten(1) @ weight).sin().view_as(x) for weight in weights])


def log_prob(o: Tensor, x: Tensor, x_next: Tensor, rows: TransitionRows) -> Tensor:
    return Normal(rows.a * x + rows.b * o, rows.sigma).log_prob(x_next).sum()


def scores(guidance: float | None, seed: int, x: Tensor, x_next: Tensor, rows: TransitionRows) -> tuple[Tensor, Tensor]:
    """s and s̄ of `network`, by autograd of the density."""
    x, x_next = x.detach().requires_grad_(), x_next.detach().requires_grad_()
    value = log_prob(guided(network(x, guidance, seed), guidance), x, x_next, rows)
    return torch.autograd.grad(value, (x_next, x))


def mean_square(residual: Tensor) -> Tensor:
    return torch.stack([(row**2).mean() for row in residual])


@pytest.fixture
def batch() -> tuple[TransitionRows, Tensor, Tensor]:
    """Three transitions x → x' of a sampler with 10 steps, in float64, and their rows."""
    x = randn(*SHAPE, dtype=torch.float64)
    rows = ddim_table(10, eta=0.8).rows(STEPS, x)
    x_next = rows.a * x + rows.b * randn(*SHAPE, seed=1, dtype=torch.float64) + rows.sigma * randn(*SHAPE, seed=2)
    return rows, x, x_next


@pytest.mark.parametrize("guidance", [None, 1.0, 5.0])
def test_unguide_is_the_adjoint_of_guide(guidance):
    pair = randn(3 if guidance is None else 6, 2, dtype=torch.float64)
    cotangent = randn(3, 2, seed=1, dtype=torch.float64)
    torch.testing.assert_close(guide(pair, guidance), guided(pair, guidance), **EXACT)
    torch.testing.assert_close((guide(pair, guidance) * cotangent).sum(), (pair * unguide(cotangent, guidance)).sum())


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_reverse_condition_with_lambda_is_that_of_one_for_the_flow_and_reward_over_lambda(batch, weight):
    rows, *_ = batch
    score, score_ref, flow, reward = (randn(*SHAPE, seed=seed, dtype=torch.float64) for seed in range(4))

    def residual(prior_weight: float, beta: float, flow: Tensor) -> Tensor:
        objective = Objective(beta=beta, prior_weight=prior_weight)
        scores = (score, score_ref, rows, flow, reward, None, None)
        return reverse_residual(*scores, objective=objective, guidance_scale=None)

    torch.testing.assert_close(
        residual(weight, 3.0, flow), weight * residual(1.0, 3.0 / weight, flow / weight), **EXACT
    )


def test_reward_weight():
    alpha_bar = torch.tensor([0.25, 1.0])
    assert reward_weight(alpha_bar, "alpha_bar").tolist() == [0.25, 1.0]
    assert reward_weight(alpha_bar, "sqrt_alpha_bar").tolist() == [0.5, 1.0]
    assert reward_weight(alpha_bar, "constant").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weighting", ["score", "sigma"])
@pytest.mark.parametrize("prior_weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("with_flow", [True, False], ids=["flow", "no_flow"])
def test_forward_balance(batch, guidance, prior_weight, weighting, with_flow):
    rows, x, x_next = batch
    output = network(x, guidance, seed=3).requires_grad_()
    output_ref = network(x, guidance, seed=4)
    flow = randn(*SHAPE, seed=5, dtype=torch.float64).requires_grad_()
    reward_score = randn(*SHAPE, seed=6, dtype=torch.float64)
    old = randn(*SHAPE, seed=7, dtype=torch.float64)
    objective = Objective(beta=2.0, prior_weight=prior_weight, weighting=weighting, trust_region_weight=3.0)
    others = (reward_score, flow if with_flow else None, old)
    settings = {"objective": objective, "guidance_scale": guidance}
    result = forward_balance(output, output_ref, x, x_next, rows, *others, **settings)

    end = x_next.clone().requires_grad_()
    (s,) = torch.autograd.grad(log_prob(guided(output, guidance), x, end, rows), end, create_graph=True)
    s_ref, _ = scores(guidance, 4, x, x_next, rows)
    g = flow if with_flow else 0 * flow
    g_inner, g_last = g * torch.tensor([1, 1, 0]).view(3, 1, 1, 1), g * torch.tensor([0, 0, 1]).view(3, 1, 1, 1)
    reward_score = 2.0 * rows.alpha_bar_next * reward_score
    unit = rows.sigma if weighting == "sigma" else 1
    residual = (s - prior_weight * s_ref - g_inner - reward_score) * unit
    parts = {
        "forward": mean_square(residual),
        "terminal": mean_square(unit * g_last),
        "trust": mean_square(guided(output, guidance) - old),
    }
    for name, part in parts.items():
        torch.testing.assert_close(getattr(result, name), part, **EXACT)
        assert not getattr(result, name).requires_grad
    loss = parts["forward"] + parts["terminal"] + 3 * parts["trust"]
    torch.testing.assert_close(result.loss, loss, **EXACT)
    inputs = (output, flow)
    row_weights = randn(3, seed=8, dtype=torch.float64)
    actual = torch.autograd.grad((row_weights * result.loss).sum(), inputs, allow_unused=not with_flow)
    expected = torch.autograd.grad((row_weights * loss).sum(), inputs)
    torch.testing.assert_close(actual[0], expected[0], **EXACT)
    if with_flow:
        torch.testing.assert_close(actual[1], expected[1], **EXACT)

    for name, tensor in {
        "norm_ref": prior_weight * s_ref,
        "norm_residual": s - prior_weight * s_ref,
        "norm_reward": reward_score,
        "norm_target": prior_weight * s_ref + g_inner + reward_score,
    }.items():
        torch.testing.assert_close(getattr(result, name), torch.stack([row.norm() for row in tensor]), **EXACT)
    torch.testing.assert_close(result.max_residual, residual.abs().amax((1, 2, 3)), **EXACT)
    assert not any(getattr(result, name).requires_grad for name in ("norm_ref", "norm_residual", "max_residual"))


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_one_product_gives_reverse_and_reward_scores(batch, guidance, prior_weight):
    """``λ s̄ + ∇R`` = direct part + Jᵀ(cotangent), with R a nonlinear function of the clean prediction; without pixel
    score ``λ s̄``."""
    rows, x, x_next = batch
    x = x.requires_grad_()
    output = network(x, guidance, seed=3)
    clean = rows.c * x + rows.d * guided(output, guidance)
    scale = 2.0 * rows.alpha_bar
    (pixel_score,) = torch.autograd.grad(clean.cos().sum(), clean, retain_graph=True)
    (reward_score,) = torch.autograd.grad((scale * clean.cos()).sum(), x, retain_graph=True)
    settings = {"objective": Objective(beta=2.0, prior_weight=prior_weight), "guidance_scale": guidance}
    _, score = scores(guidance, 3, x, x_next, rows)
    e = (x_next - rows.a * x - rows.b * guided(output, guidance)).detach() / rows.sigma**2
    for pixel, direct, reward in ((pixel_score, scale * rows.c * pixel_score, reward_score), (None, 0, 0)):
        cotangent = reverse_cotangent(output, x, x_next, rows, pixel, **settings)
        assert not cotangent.requires_grad
        (vjp,) = torch.autograd.grad(output, x, cotangent, retain_graph=True)
        torch.testing.assert_close(prior_weight * rows.a * e + direct + vjp, prior_weight * score + reward, **EXACT)


@pytest.mark.parametrize("whole", [True, False], ids=["scores", "products"])
@pytest.mark.parametrize("weighting", ["score", "sigma"])
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_reverse_balance(batch, guidance, prior_weight, weighting, whole):
    rows, x, x_next = batch
    x = x.requires_grad_()
    output, output_ref = network(x, guidance, seed=3), network(x, guidance, seed=4)
    flow = randn(*SHAPE, seed=5, dtype=torch.float64).requires_grad_()
    clean = rows.c * x + rows.d * guided(output, guidance)
    (pixel_score,) = torch.autograd.grad(clean.cos().sum(), clean, retain_graph=True)
    (reward_score,) = torch.autograd.grad(clean.cos().sum(), x, retain_graph=True)
    objective = Objective(beta=2.0, prior_weight=prior_weight, weighting=weighting)
    settings = {"objective": objective, "guidance_scale": guidance}
    (_, score), (_, score_ref) = (scores(guidance, seed, x, x_next, rows) for seed in (3, 4))
    if whole:
        loss = reverse_balance(score, score_ref, rows, flow, reward_score, **settings)
    else:
        outputs = (output.detach(), output_ref.detach())
        products = []
        for o, pixel in ((output, pixel_score), (output_ref, None)):
            cotangent = reverse_cotangent(o, x, x_next, rows, pixel, **settings)
            products += torch.autograd.grad(o, x, cotangent, retain_graph=True)
        loss = reverse_balance(*products, rows, flow, None, pixel_score, outputs, **settings)

    residual = prior_weight * (score - score_ref) + flow + 2.0 * rows.alpha_bar * reward_score
    residual = residual * torch.tensor([1, 1, 0]).view(3, 1, 1, 1)
    expected = mean_square(residual * (rows.sigma if weighting == "sigma" else 1))
    torch.testing.assert_close(loss, expected, **EXACT)
    assert torch.autograd.grad(loss.sum(), x, retain_graph=True, allow_unused=True) == (None,)
    (actual,) = torch.autograd.grad(loss.sum(), flow)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), flow)[0], **EXACT)


@pytest.mark.parametrize("guidance", [None, 5.0])
def test_gaussian_log_prob(batch, guidance):
    rows, x, x_next = batch
    output = network(x, guidance, seed=3).requires_grad_()
    inputs = (output, x.requires_grad_(), x_next.requires_grad_())
    density = Normal(rows.a * x + rows.b * guided(output, guidance), rows.sigma)
    expected = torch.stack([row.sum() for row in density.log_prob(x_next)])
    actual = gaussian_log_prob(output, x, x_next, rows, guidance_scale=guidance)
    torch.testing.assert_close(actual, expected, **EXACT)
    row_weights = randn(3, seed=8, dtype=torch.float64)
    for one, other in zip(
        *(torch.autograd.grad((row_weights * value).sum(), inputs) for value in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_guided_step(batch):
    rows, x, _ = batch
    output, noise = network(x, 5.0, seed=3), randn(*SHAPE, seed=4, dtype=torch.float64)
    x_next, o = guided_step(output, x, noise, rows, guidance_scale=5.0)
    torch.testing.assert_close(o, guided(output, 5.0), **EXACT)
    torch.testing.assert_close(x_next, rows.a * x + rows.b * guided(output, 5.0) + rows.sigma * noise, **EXACT)
    low, o = guided_step(output.bfloat16(), x.bfloat16(), noise, rows, guidance_scale=5.0)
    assert (low.dtype, o.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_inputs_are_computed_in_float32(batch, dtype):
    rows, x, x_next = (batch[0], *(tensor.to(dtype) for tensor in batch[1:]))
    rows = ddim_table(10, eta=0.8).rows(STEPS, x)
    output, output_ref = (network(x.float(), 5.0, seed=seed).to(dtype).requires_grad_() for seed in (3, 4))
    arguments = (output, output_ref, x, x_next, rows, randn(*SHAPE))
    settings = {"objective": Objective(beta=1.0, prior_weight=0.5), "guidance_scale": 5.0}
    low = forward_balance(*arguments, **settings)
    arguments = (output.float(), output_ref.float(), x.float(), x_next.float(), rows, randn(*SHAPE))
    assert torch.equal(low.loss, forward_balance(*arguments, **settings).loss)
    low.loss.sum().backward()
    assert output.grad.dtype == dtype
    assert output_ref.grad is None


def test_the_cancelled_score_difference_keeps_its_digits():
    """At the last three of 50 steps (σ from 0.10 to 0.02), for a policy 1e-3 away from the pretrained one: error of
    float32 against float64 on the same inputs. Measured: 6e-8 to 1.5e-7 by hand, 4e-5 to 6e-5 by difference."""
    x = randn(3, 4, 8, 8)
    table = ddim_table(50)
    rows, exact = (table.rows(torch.tensor([47, 48, 49]), like) for like in (x, x.double()))
    o_ref = randn(3, 4, 8, 8, seed=1)
    o = o_ref + 1e-3 * randn(3, 4, 8, 8, seed=2)
    x_next = rows.a * x + rows.b * o + rows.sigma * randn(3, 4, 8, 8, seed=3)
    truth = (exact.b / exact.sigma**2) * (o.double() - o_ref.double())
    cancelled = score_residual(o, o_ref, x, x_next, rows, prior_weight=1.0)
    difference = step_score(o, x, x_next, rows) - step_score(o_ref, x, x_next, rows)
    errors = [(relative_error(cancelled[i], truth[i]), relative_error(difference[i], truth[i])) for i in range(3)]
    assert all(by_hand < 5e-7 for by_hand, _ in errors)
    assert all(naive > 50 * by_hand for by_hand, naive in errors)
