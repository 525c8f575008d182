"""The fused forward residual against plain torch in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.published import ddim_table
from fastnabla.objective.fused import FUSED
from fastnabla.objective.gaussian import step_score
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows, TransitionTable
from tests.checks import randn, relative_error
from tests.kernel_cases import DTYPES, LAST, Case, assert_matches, on_each_device
from tests.kernels.operations import FORWARD_BALANCE


@on_each_device
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_values_and_gradients(device, guidance, prior_weight, dtypes):
    case = Case.of(guidance_scale=guidance, prior_weight=prior_weight, **DTYPES[dtypes])
    assert_matches(FORWARD_BALANCE.evaluate, case.draw(device))


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {"steps": (0, 5)},
        {"steps": (LAST, LAST)},
        {"without": ("flow_next",)},
        {"without": ("output_old",)},
        {"without": ("flow_next", "output_old")},
        {"trust_region_weight": 0.0},
        {"weighting": "sigma"},
        {"weighting": "sigma", "prior_weight": 1.0},
        {"gamma": "sqrt_alpha_bar"},
        {"gamma": "constant"},
        {"beta": 0.0, "prior_weight": 0.0},
    ],
    ids=str,
)
def test_options(device, options):
    assert_matches(FORWARD_BALANCE.evaluate, Case.of(**options).draw(device))


@on_each_device
def test_upstream_gradients_may_be_one_number(device):
    """As those of a sum are: all rows read the same element."""
    batch = Case().draw(device)
    output = batch["output"].requires_grad_()
    loss = FORWARD_BALANCE.compute(FUSED, batch)["loss"]
    (actual,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, output, torch.ones_like(loss))
    assert torch.equal(actual, expected)


@on_each_device
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_noise_costs_no_digits(device, state_dtype):
    """At the last three of 50 steps (σ from 0.10 to 0.02), for bfloat16 outputs of a policy 1e-2 away from the
    pretrained one: error of the residual against float64 on the same inputs.

    Measured: 2.5e-8 to 4e-8 fused; 2.8e-6 to 5.7e-6, at least 75 times as much, as a difference of two scores in
    float32; 0.12 to 0.37 as a difference of two scores in bfloat16. With bfloat16 states, the same.
    """
    table = ddim_table(50)
    columns = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    # Followed by a copy, the last step is an inner one: its residual can be read from the gradient of the flow.
    table = TransitionTable(**{name: torch.cat([column, column[-1:]]) for name, column in columns.items()})
    x = randn(3, 4, 16, 16)
    rows = table.rows(torch.tensor([47, 48, 49]), x)
    o_ref = randn(*x.shape, seed=1)
    o = o_ref + 1e-2 * randn(*x.shape, seed=2)
    x_next = rows.a * x + rows.b * o + rows.sigma * randn(*x.shape, seed=3)
    o, o_ref, x, x_next = (
        tensor.to(device, dtype)
        for tensor, dtype in ((o, torch.bfloat16), (o_ref, torch.bfloat16), (x, state_dtype), (x_next, state_dtype))
    )
    rows, exact = (table.rows(rows.step_index.to(device), like) for like in (x, x.double()))
    flow = torch.zeros_like(x, dtype=torch.float32).requires_grad_()
    settings = {"objective": Objective(beta=0.0), "guidance_scale": None}
    loss = FUSED.forward_balance(o, o_ref, x, x_next, rows, torch.zeros_like(flow), flow, **settings).loss
    (gradient,) = torch.autograd.grad(loss.sum(), flow)
    fused = -x[0].numel() / 2 * gradient  # loss = mean (residual − flow)²

    def difference(rows: TransitionRows, cast: Callable[[Tensor], Tensor]) -> Tensor:
        return step_score(cast(o), cast(x), cast(x_next), rows) - step_score(cast(o_ref), cast(x), cast(x_next), rows)

    def low_score(o: Tensor) -> Tensor:
        a, b, sigma = (column.bfloat16() for column in (rows.a, rows.b, rows.sigma))
        return -(x_next.bfloat16() - a * x.bfloat16() - b * o) / sigma**2

    truth = difference(exact, Tensor.double)
    for i in range(3):
        error = relative_error(fused[i], truth[i])
        assert error < 1e-7
        assert relative_error(difference(rows, Tensor.float)[i], truth[i]) > 30 * error
        assert relative_error((low_score(o) - low_score(o_ref))[i], truth[i]) > 0.05
