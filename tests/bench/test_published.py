"""The baseline of the kernels' benchmarks computes what it is compared with."""

import dataclasses

import pytest
import torch

from bench.published import PUBLISHED, ddim_table
from fastnabla.objective.ops import PLAIN
from fastnabla.objective.settings import Objective
from tests import checks
from tests.checks import randn

SHAPE = (3, 4, 5, 7)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("eta", [1.0, 0.8])
def test_table_is_that_of_diffusers(eta):
    expected = checks.ddim_table(50, eta)
    for field in dataclasses.fields(expected):
        torch.testing.assert_close(
            getattr(ddim_table(50, eta), field.name), getattr(expected, field.name), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_operations_are_those_of_plain_torch(guidance, prior_weight):
    """In float64, values and gradients; one of the rows is a last transition."""
    copies = 1 if guidance is None else 2
    x, x_next, reward, old, noise = (randn(*SHAPE, seed=seed, dtype=torch.float64) for seed in range(5))
    output, output_ref = (randn(copies * 3, *SHAPE[1:], seed=seed, dtype=torch.float64) for seed in (5, 6))
    flow = randn(*SHAPE, seed=7, dtype=torch.float64).requires_grad_()
    output.requires_grad_()
    rows = ddim_table(10).rows(torch.tensor([0, 6, 9]), x)
    objective = Objective(beta=3.0, prior_weight=prior_weight, weighting="sigma", trust_region_weight=2.0)
    settings = {"objective": objective, "guidance_scale": guidance}

    def results(operations):
        pairs = (output.detach(), output_ref)
        forward = operations.forward_balance(output, output_ref, x, x_next, rows, reward, flow, old, **settings)
        reverse = operations.reverse_balance(x, x_next, rows, flow, None, reward, pairs, **settings)
        scores = operations.reverse_balance(x, x_next, rows, flow, reward, **settings)
        log_prob = operations.gaussian_log_prob(output, x, x_next, rows, guidance_scale=guidance)
        losses = (forward.loss, reverse, scores, log_prob)
        gradients = [torch.autograd.grad(v.sum(), (output, flow), allow_unused=True) for v in losses]
        return [
            *losses,
            *(getattr(forward, field.name) for field in dataclasses.fields(forward)),
            *(gradient for pair in gradients for gradient in pair if gradient is not None),
            operations.reverse_cotangent(pairs[0], x, x_next, rows, reward, **settings),
            operations.reverse_cotangent(pairs[1], x, x_next, rows, **settings),
            *operations.guided_step(pairs[0], x, noise, rows, guidance_scale=guidance),
        ]

    for actual, expected in zip(results(PUBLISHED), results(PLAIN), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)
