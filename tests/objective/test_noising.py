"""DDPM's noising kernel as P_B, in float64."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch.distributions import Normal

from fastnabla.objective.balance import forward_balance, reverse_balance, reverse_cotangent
from fastnabla.objective.noising import (
    check_is_ddpm,
    noising_log_prob,
    noising_output,
    noising_reverse,
    renoise,
)
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionTable
from tests.checks import DDIM, STABLE_DIFFUSION, ddim_table, flow_table, randn
from tests.exact import Smooth, grad

SIZE, STEPS = 5, 10


def solver_table(kind: str) -> TransitionTable:
    settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "final_sigmas_type": "sigma_min"}
    scheduler = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **settings, prediction_type=kind)
    return TransitionTable.from_scheduler(scheduler, STEPS)


TABLES = {
    **{kind: ddim_table(STEPS, prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")},
    **{f"solver {kind}": solver_table(kind) for kind in ("epsilon", "v_prediction")},
    "flow": flow_table(STEPS, end=0.02),
}


def states(table: TransitionTable):
    step = torch.arange(STEPS)
    x, x_next = (randn(STEPS, SIZE, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2))
    return x, x_next, table.rows(step, x)


def densities(table: TransitionTable, x, x_next, o):
    """log P and log P_B: noise is added to x' until it has the signal-to-noise ratio of x."""
    names = ("a", "b", "sigma", "alpha_bar", "alpha_bar_next", "noise_std", "noise_std_next")
    a, b, sigma, signal, signal_next, noise, noise_next = (getattr(table, name)[:, None] for name in names)
    scale = (signal / signal_next).sqrt()
    added = (noise**2 - scale**2 * noise_next**2).sqrt()
    forward = Normal(a * x + b * o, sigma).log_prob(x_next).sum()
    return forward, Normal(scale * x_next, added).log_prob(x).sum(1)


@pytest.mark.parametrize("name", TABLES)
def test_residuals_are_those_of_the_densities(name):
    """Forward and reverse residual of plain ∇-DB, through the functions of residual ∇-DB."""
    table = TABLES[name]
    check_is_ddpm(table, "db")
    x, x_next, row = states(table)
    o = Smooth(SIZE)(x)
    log_forward, log_backward = densities(table, x, x_next, o)
    forward = grad(log_forward, x_next, retain_graph=True) - grad(log_backward.sum(), x_next, retain_graph=True)
    reverse = grad(log_forward, x, retain_graph=True) - grad(log_backward.sum(), x)

    settings = {"objective": Objective(beta=0.0), "guidance_scale": None}
    o_noising, zero = noising_output(x.detach(), x_next.detach(), row), torch.zeros_like(x)
    result = forward_balance(o.detach(), o_noising, x, x_next, row, zero, **settings)
    torch.testing.assert_close(result.forward, forward.square().mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.norm_ref, (grad(densities(table, x, x_next, o)[1].sum(), x_next)).norm(dim=1))

    cotangent = reverse_cotangent(o.detach(), x, x_next, row, **settings)
    (vjp,) = torch.autograd.grad(Smooth(SIZE)(x), x, cotangent)
    rest, outputs = noising_reverse(x.detach(), x_next.detach(), row), (o, o_noising)
    loss = reverse_balance(vjp, rest, row, zero, zero, outputs=outputs, **settings)
    expected = reverse.square().mean(1)
    expected[-1] = 0  # the last transition has no reverse residual
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_log_density(name):
    x, x_next, row = states(TABLES[name])
    _, expected = densities(TABLES[name], x, x_next, x)
    torch.testing.assert_close(noising_log_prob(x, x_next, row), expected)


def test_renoised_states_have_the_kernels_moments():
    """100,000 draws of one number: mean and variance to four standard errors."""
    table, count = TABLES["epsilon"], 100_000
    x_next, step = torch.full((count, 1), 0.7, dtype=torch.float64), torch.full((count,), 3)
    x = renoise(x_next, randn(count, 1, dtype=torch.float64), table.rows(step, x_next))
    share = table.alpha_bar[3] / table.alpha_bar_next[3]
    assert abs(x.mean() - share.sqrt() * 0.7) < 4 * ((1 - share) / count).sqrt()
    assert abs(x.var() / (1 - share) - 1) < 4 * (2 / count) ** 0.5


@pytest.mark.parametrize("eta", [0.5, 0.99])
def test_only_ddpm_is_reversed(eta):
    table = TransitionTable.from_scheduler(DDIMScheduler(**DDIM), STEPS, eta)
    with pytest.raises(ValueError, match=r"method = 'db'.*set sampler\.eta = 1"):
        check_is_ddpm(table, "db")


def test_other_variances_are_not_reversed():
    table = TABLES["epsilon"].with_min_sigma(0.1)
    with pytest.raises(ValueError, match=r"method = 'dag'.*set sampler\.min_sigma = None"):
        check_is_ddpm(table, "dag")
