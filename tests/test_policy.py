import pytest
import torch
from diffusers import UNet2DConditionModel

from fastnabla.policy import Policy
from tests.checks import randn
from tests.golden import STEP_SETS

UNET = STEP_SETS[0] / "unet"
X, TIMESTEP, PROMPT = randn(3, 4, 8, 8), torch.tensor([901, 51, 1]), torch.tensor([2, 0, 1])
CONDITIONS = randn(4, 7, 16, seed=1)


def build(guidance_scale: float | None = 5.0) -> Policy:
    torch.manual_seed(0)
    return Policy(UNet2DConditionModel.from_pretrained(UNET), CONDITIONS, guidance_scale, rank=4)


def perturbed(guidance_scale: float | None = 5.0) -> Policy:
    """A policy whose LoRA does something."""
    policy = build(guidance_scale)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy


@torch.no_grad()
def pretrained(x, timestep, condition):
    unet = UNet2DConditionModel.from_pretrained(UNET).eval()
    return unet(x, timestep, encoder_hidden_states=condition).sample


@torch.no_grad()
def test_pairs():
    """Unconditional rows first; with the adapter off the pretrained network, to the bit."""
    policy = perturbed()
    condition = CONDITIONS[[0, 0, 0, 3, 1, 2]]
    expected = pretrained(torch.cat([X, X]), torch.cat([TIMESTEP, TIMESTEP]), condition)
    assert torch.equal(policy.reference(X, TIMESTEP, PROMPT), expected)
    with policy.pretrained_weights():
        assert torch.equal(policy(X, TIMESTEP, PROMPT), expected)
    assert not torch.allclose(policy(X, TIMESTEP, PROMPT), expected)


@pytest.mark.parametrize("guidance_scale", [None, 1, 1.0])
@torch.no_grad()
def test_without_guidance(guidance_scale):
    policy = perturbed(guidance_scale)
    assert policy.guidance_scale is None
    assert policy(X, TIMESTEP, PROMPT).shape == X.shape
    assert torch.equal(policy.reference(X, TIMESTEP, PROMPT), pretrained(X, TIMESTEP, CONDITIONS[PROMPT + 1]))


@torch.no_grad()
def test_starts_as_the_pretrained_policy():
    policy = build()
    assert torch.equal(policy(X, TIMESTEP, PROMPT), policy.reference(X, TIMESTEP, PROMPT))


def test_adapter_comes_back_after_an_error():
    policy = perturbed()
    before = policy(X, TIMESTEP, PROMPT)
    with pytest.raises(RuntimeError, match="within"), policy.pretrained_weights():
        raise RuntimeError("within")
    assert torch.equal(policy(X, TIMESTEP, PROMPT), before)


def test_trains_the_lora_alone():
    policy = build()
    policy(X, TIMESTEP, PROMPT).square().mean().backward()
    trained = {name for name, parameter in policy.unet.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in policy.unet.named_parameters() if "lora_" in name}
    assert len(policy.trainable()) == len(trained)
    assert all(parameter.dtype == torch.float32 for parameter in policy.trainable())


def test_lora_stays_float32_in_a_half_precision_network():
    policy = Policy(UNet2DConditionModel.from_pretrained(UNET).bfloat16(), CONDITIONS.bfloat16(), 5.0)
    assert {parameter.dtype for parameter in policy.trainable()} == {torch.float32}
    output = policy(X, TIMESTEP, PROMPT)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.trainable())


def test_passes_are_counted_by_rows():
    """A forward of N guided rows counts N; so does every backward into its output."""
    policy = build()
    x = X.clone().requires_grad_()
    output = policy(x, TIMESTEP, PROMPT)
    assert policy.passes.rows == 3
    torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert policy.passes.rows == 6
    output.square().mean().backward()
    assert policy.passes.rows == 9
    with torch.no_grad():
        policy.reference(X[:2], TIMESTEP[:2], PROMPT[:2])
    assert policy.passes.rows == 11
