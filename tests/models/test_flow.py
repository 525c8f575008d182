"""The flow network: its start at zero, its inputs, precision and gradients."""

import pytest
import torch

from fastnabla.models.flow import ConvFlow, UNetFlow, build_flow
from tests.checks import randn

X, TIMESTEP, EMBEDDINGS = randn(2, 4, 8, 8), torch.tensor([901, 1]), randn(2, 7, 16, seed=1)


@pytest.fixture(params=["unet", "conv"])
def flow(request):
    torch.manual_seed(0)
    return UNetFlow(4, 16, widths=(8, 16, 16, 16)) if request.param == "unet" else ConvFlow(4, 16, width=8)


def perturbed(flow):
    last = flow.unet.conv_out if isinstance(flow, UNetFlow) else flow.last
    torch.nn.init.normal_(last.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return flow


def test_starts_at_zero_and_can_leave(flow):
    output = flow(X, TIMESTEP, EMBEDDINGS)
    assert output.shape == X.shape
    assert not output.any()
    (output - 1).square().mean().backward()
    gradients = [parameter.grad for parameter in flow.parameters() if parameter.grad is not None]
    assert any(gradient.any() for gradient in gradients)


def test_depends_on_everything(flow):
    flow = perturbed(flow)
    output = flow(X, TIMESTEP, EMBEDDINGS)
    for other in (
        flow(X.flip(-1), TIMESTEP, EMBEDDINGS),
        flow(X, TIMESTEP.flip(0), EMBEDDINGS),
        flow(X, TIMESTEP, EMBEDDINGS.flip(0)),
    ):
        assert (other - output).abs().max() > 1e-4 * output.abs().max()


def test_rows_are_independent(flow):
    flow = perturbed(flow)
    together = flow(X, TIMESTEP, EMBEDDINGS)
    alone = torch.cat([flow(X[i : i + 1], TIMESTEP[i : i + 1], EMBEDDINGS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite(flow):
    perturbed(flow)(X, TIMESTEP, EMBEDDINGS).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in flow.parameters())


def test_half_precision_inputs(flow):
    assert flow(X.bfloat16(), TIMESTEP, EMBEDDINGS.bfloat16()).dtype == torch.float32


def test_double_precision(flow):
    expected = perturbed(flow)(X, TIMESTEP, EMBEDDINGS)
    output = flow.double()(X.double(), TIMESTEP, EMBEDDINGS.double())
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), expected, rtol=1e-5, atol=1e-6)


def test_build_flow():
    assert build_flow("none", 4, 16, seed=0) is None
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    flow, same, other = (build_flow("conv", 4, 16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(flow, ConvFlow)
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), same.parameters(), strict=True))
    assert not torch.equal(flow.first.weight, other.first.weight)
    assert isinstance(build_flow("unet", 4, 16, seed=0), UNetFlow)
