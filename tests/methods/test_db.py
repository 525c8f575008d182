"""Plain ∇-DB: the training step against its definition in float64, every score by autograd of a log-density."""

import pytest
import torch

from fastnabla.objective.balance import forward_balance
from fastnabla.objective.noising import noising_output
from fastnabla.objective.settings import Objective
from tests.checks import BACKENDS, assert_gradients
from tests.exact import Exact
from tests.small_step import shared_step


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_flow", [True, False])
def test_gradients(with_flow, backend):
    golden = shared_step() if with_flow else shared_step().without_flow()
    step = golden.step(4, backend, noising=True, prior_weight=1.0, gamma="alpha_bar")
    for parameter in step.parameters:
        parameter.grad = None
    report = step(golden.transitions)
    exact = Exact(golden)
    assert_gradients(golden.gradients(), exact.gradients(golden, exact.balance_loss(step.objective, noising=True)))
    assert report.passes == ({"inner": 5, "last": 2} if golden.flow else {"inner": 4, "last": 2})


def test_a_network_that_knows_the_clean_sample_has_no_forward_residual():
    """What ∇-DB asks for without a reward: a step towards x̂0 = x'/√ᾱ' is P_B's exact reversal."""
    golden = shared_step()
    rows = golden.transitions
    row = golden.table.rows(rows.step_index, rows.x)
    o, zero = noising_output(rows.x, rows.x_next, row), torch.zeros_like(rows.x)
    settings = {"objective": Objective(beta=0.0), "guidance_scale": None}
    clean = row.c * rows.x + row.d * o
    torch.testing.assert_close(clean, rows.x_next / row.alpha_bar_next.sqrt(), rtol=1e-4, atol=1e-4)
    assert not forward_balance(o, o, rows.x, rows.x_next, row, zero, **settings).forward.any()
