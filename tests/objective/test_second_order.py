"""The reverse residual's gradient to θ, against double backward in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.checks import BACKENDS, assert_gradients
from tests.exact import Exact, grad
from tests.golden import GoldenStep
from tests.small_step import shared_step, small_step


def gradients(golden: GoldenStep, step) -> dict[str, Tensor]:
    for parameter in step.parameters:
        parameter.grad = None
    step(golden.transitions)
    return {name: gradient.clone() for name, gradient in golden.gradients().items()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    """With a ρ at which the second-order part is most of the gradient; at ρ = 1 the forward residual's buries it."""
    golden = shared_step()
    inner = golden.transitions.step_index < len(golden.table) - 1
    golden = dataclasses.replace(golden, transitions=golden.transitions[inner])
    step = golden.step(4, backend, reverse_second_order=True, reverse_weight=1e6, trust_region_weight=0.0)
    second = gradients(golden, step)
    exact = Exact(golden)
    assert_gradients(second, exact.gradients(golden, exact.balance_loss(step.objective)))
    first = gradients(golden, golden.step(4, backend, reverse_weight=1e6, trust_region_weight=0.0))
    lora = [name for name in second if name.startswith("grad.lora")]
    distance, size = (
        torch.stack([values[name].norm() for name in lora]).norm()
        for values in ({name: first[name] - second[name] for name in lora}, second)
    )
    assert distance > 0.5 * size


@pytest.mark.parametrize("settings", [{"compile": "whole"}, {"checkpoint": True}])
def test_networks_without_second_derivatives_are_refused(settings):
    golden = small_step()
    golden.policy.optimise(**settings)
    with pytest.raises(ValueError, match=r"reverse_second_order = True.*--compute\.compile none"):
        golden.step(4, reverse_second_order=True)


def test_fused_attention_has_no_second_derivatives():
    """Why the step chooses its attention; if torch learns it, the step need not."""
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        first = grad(scaled_dot_product_attention(x, x, x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            grad(first.sum(), x)
