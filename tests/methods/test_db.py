"""Plain ∇-DB: the training step against its definition in float64, every score by autograd of a log-density."""

import functools

import pytest
import torch
from torch import Tensor

from fastnabla.objective.balance import forward_balance
from fastnabla.objective.noising import noising_output
from fastnabla.objective.settings import Objective
from tests.checks import BACKENDS, assert_gradients
from tests.exact import Exact, grad
from tests.golden import STEP_SETS, GoldenStep, load_step

WITH_FLOW = next(folder for folder in STEP_SETS if (folder / "flow").exists())
load_once = functools.cache(load_step)


def expected_gradients(golden: GoldenStep, objective: Objective) -> dict[str, Tensor]:
    exact, total = Exact(golden), 0
    for i, x, x_next, o_old, prompt in exact.rows():
        last = i == len(exact.table) - 1

        def reward_score(state: Tensor, o: Tensor, after: bool, i=i, prompt=prompt) -> Tensor:
            o = o.detach() if objective.reward_gradient == "lookahead_detached" else o
            reward = exact.reward(exact.clean(state, o, i, after), prompt).sum()
            alpha_bar = exact.at("alpha_bar_next" if after else "alpha_bar", i)
            return objective.beta * alpha_bar * grad(reward, state, retain_graph=True)

        o = exact.output(x, i, prompt)
        log_forward, log_backward = exact.log_prob(x, x_next, o, i), exact.log_noising(x, x_next, i)
        forward = grad(log_forward, x_next, create_graph=True) - grad(log_backward, x_next, retain_graph=True)
        forward = forward - reward_score(x_next, exact.output(x_next, i, prompt, after=True), True)
        loss = objective.trust_region_weight * (o - o_old).square().mean()
        if exact.flow is not None:
            g_next = exact.flow_at(x_next.detach(), i, prompt, after=True)
            if last:
                loss = loss + g_next.square().mean()
            else:
                forward = forward - g_next
                reverse = grad(log_forward, x, retain_graph=True) - grad(log_backward, x)
                reverse = reverse + reward_score(x, o, False) + exact.flow_at(x.detach(), i, prompt)
                loss = loss + objective.reverse_weight * reverse.square().mean()
        total = total + (loss + forward.square().mean()) / len(exact.transitions)
    return exact.gradients(golden, total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_flow", [True, False])
def test_gradients(with_flow, backend):
    golden = load_once(WITH_FLOW) if with_flow else load_once(WITH_FLOW).without_flow()
    step = golden.step(4, backend, noising=True)
    for parameter in step.parameters:
        parameter.grad = None
    report = step(golden.transitions)
    assert_gradients(golden.gradients(), expected_gradients(golden, step.objective))
    assert report.passes == ({"inner": 5, "last": 2} if golden.flow else {"inner": 4, "last": 2})


def test_a_network_that_knows_the_clean_sample_has_no_forward_residual():
    """What ∇-DB asks for without a reward: a step towards x̂0 = x'/√ᾱ' is P_B's exact reversal."""
    golden = load_once(WITH_FLOW)
    rows = golden.transitions
    row = golden.table.rows(rows.step_index, rows.x)
    o, zero = noising_output(rows.x, rows.x_next, row), torch.zeros_like(rows.x)
    settings = {"objective": Objective(beta=0.0), "guidance_scale": None}
    clean = row.c * rows.x + row.d * o
    torch.testing.assert_close(clean, rows.x_next / row.alpha_bar_next.sqrt(), rtol=1e-4, atol=1e-4)
    assert not forward_balance(o, o, rows.x, rows.x_next, row, zero, **settings).forward.any()
