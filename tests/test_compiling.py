"""torch.compile of what is differentiated twice: the same gradients, and nothing compiled anew."""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fastnabla import compiling
from tests.checks import assert_gradients, randn
from tests.golden import load_step
from tests.test_sharing import GOLDEN, batch, gradients


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before, and nothing left."""
    torch._dynamo.reset()
    counters.clear()
    with torch._functorch.config.patch(), torch._dynamo.config.patch():
        yield
    torch._dynamo.reset()
    counters.clear()


def test_training_step_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    golden = load_step(GOLDEN)
    transitions = batch(golden)
    step = golden.step(4, guidance="lookahead_detached")
    expected = gradients(golden, step, transitions)
    golden.policy.optimise(compile="whole")
    assert_gradients(gradients(golden, step, transitions), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for _ in range(2):
        assert_gradients(gradients(golden, step, transitions), expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_graph_is_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    network = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
    x = randn(128, 64).requires_grad_()

    def twice(function) -> tuple[torch.Tensor, ...]:
        output = function(x)
        (first,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        return first, *torch.autograd.grad(output.square().sum(), list(network.parameters()))

    expected = twice(network)
    for actual, tensor in zip(twice(compiling.compiled(network.forward)), expected, strict=True):
        torch.testing.assert_close(actual, tensor, rtol=1e-4, atol=1e-4)
    assert not torch._functorch.config.donated_buffer
