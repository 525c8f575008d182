"""The policy: guidance, switching the adapter off, what is trained, precision, saving."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from fastnabla.models.conditions import Conditions
from fastnabla.models.lora import ADAPTER
from fastnabla.models.policy import Policy
from fastnabla.models.saved_policy import save_policy
from tests.checks import assert_gradients, randn, relative_error
from tests.golden import STEP_SETS

UNET = STEP_SETS[0] / "unet"
X, TIMESTEP, PROMPT = randn(3, 4, 8, 8), torch.tensor([901, 51, 1]), torch.tensor([2, 0, 1])
CONDITIONS = randn(4, 7, 16, seed=1)


def build(guidance_scale: float | None = 5.0, rank: int = 4) -> Policy:
    torch.manual_seed(0)
    return Policy(UNet2DConditionModel.from_pretrained(UNET), Conditions(CONDITIONS), guidance_scale, rank=rank)


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


def in_precision(policy: Policy, kind: str) -> Policy:
    if kind == "one_graph":
        policy.lora.one_graph = True
    elif kind == "bfloat16":
        policy.network.bfloat16()
        policy.conditions.bfloat16()
        for parameter in policy.trainable():
            parameter.data = parameter.data.float()
        policy.dtype = torch.bfloat16
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "one_graph"])
def test_scaled_lora_lies_between_the_pretrained_and_the_finetuned_policy(kind):
    policy = in_precision(perturbed(), kind)
    before, reference = policy(X, TIMESTEP, PROMPT), policy.reference(X, TIMESTEP, PROMPT)
    with policy.scaled_lora(0):
        assert torch.equal(policy(X, TIMESTEP, PROMPT), reference)
        with policy.scaled_lora(1.0):
            assert torch.equal(policy(X, TIMESTEP, PROMPT), before)
        assert torch.equal(policy(X, TIMESTEP, PROMPT), reference)
    with pytest.raises(RuntimeError, match="within"), policy.scaled_lora(0.5):
        half = policy(X, TIMESTEP, PROMPT)
        assert torch.equal(policy.reference(X, TIMESTEP, PROMPT), reference)
        assert torch.equal(policy(X, TIMESTEP, PROMPT), half)
        raise RuntimeError("within")
    assert not torch.equal(half, before) and not torch.equal(half, reference)
    after = policy(X, TIMESTEP, PROMPT)
    assert torch.equal(after, before)

    # Graphs from outside the context stay valid.
    gradients = torch.autograd.grad(before.float().sum(), policy.weights())
    for actual, expected in zip(torch.autograd.grad(after.float().sum(), policy.weights()), gradients, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "one_graph"])
@pytest.mark.parametrize("scale", [0.25, -1.5])
def test_scaled_lora_equals_pefts_scale(scale, kind):
    """PEFT's own layers, scaled as `pipeline.set_adapters` does, give the same output and gradients."""
    targets = ("to_q", "to_out.0", "conv1")
    torch.manual_seed(0)
    policy = in_precision(
        Policy(UNet2DConditionModel.from_pretrained(UNET), Conditions(CONDITIONS), None, rank=4, targets=targets), kind
    )
    for number, parameter in enumerate(policy.trainable()):
        parameter.data = 0.1 * randn(*parameter.shape, seed=number)
    plain = UNet2DConditionModel.from_pretrained(UNET).requires_grad_(False)
    plain.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(targets)), adapter_name=ADAPTER)
    plain.load_state_dict(policy.network.state_dict())
    plain.set_adapters(ADAPTER, scale)
    x = X.clone().requires_grad_()
    expected = plain(x, TIMESTEP, encoder_hidden_states=CONDITIONS[PROMPT + 1]).sample
    with policy.scaled_lora(scale):
        output = policy(x, TIMESTEP, PROMPT)
    assert relative_error(output, expected) < 1e-5
    trained = [parameter for name, parameter in plain.named_parameters() if "lora_" in name]
    theirs = torch.autograd.grad(expected.square().sum(), [x, *trained])
    ours = torch.autograd.grad(output.square().sum(), [x, *policy.weights()])
    for actual, gradient in zip(ours, theirs, strict=True):
        assert relative_error(actual, gradient) < 1e-4


def test_scale_that_cannot_be_used_is_an_error():
    policy = build()
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"LoRA scale = {scale}: must be finite"), policy.scaled_lora(scale):
            pass
    with pytest.raises(ValueError, match=r"all parameters of this network are trained \(lora.rank = 0\)"):
        build(rank=0).scaled_lora(0.5)


def test_trains_the_lora_alone():
    policy = build()
    policy(X, TIMESTEP, PROMPT).square().mean().backward()
    trained = {name for name, parameter in policy.network.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in policy.network.named_parameters() if "lora_" in name}
    assert len(policy.trainable()) == len(trained)
    assert all(parameter.dtype == torch.float32 for parameter in policy.trainable())


def test_lora_stays_float32_in_a_half_precision_network():
    policy = Policy(UNet2DConditionModel.from_pretrained(UNET).bfloat16(), Conditions(CONDITIONS).bfloat16(), 5.0)
    assert {parameter.dtype for parameter in policy.trainable()} == {torch.float32}
    output = policy(X, TIMESTEP, PROMPT)
    assert output.dtype == torch.bfloat16
    loss = output.float().square().mean()
    policy.accumulate(torch.autograd.grad(loss, policy.weights(), retain_graph=True))
    gradients = [parameter.grad.clone() for parameter in policy.trainable()]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients) and any(gradient.any() for gradient in gradients)
    loss.backward()  # the same again
    for parameter, gradient in zip(policy.trainable(), gradients, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


@pytest.mark.slow
def test_half_precision_follows_every_change_of_the_lora():
    """By an optimizer, by assignment, and by what autograd does not see."""
    policy = Policy(UNet2DConditionModel.from_pretrained(UNET).bfloat16(), Conditions(CONDITIONS).bfloat16(), 5.0)
    seen = [policy(X, TIMESTEP, PROMPT)]

    def changes() -> None:
        seen.append(policy(X, TIMESTEP, PROMPT))
        assert not torch.equal(seen[-1], seen[-2])
        fresh = Policy(UNet2DConditionModel.from_pretrained(UNET).bfloat16(), Conditions(CONDITIONS).bfloat16(), 5.0)
        for parameter, values in zip(fresh.trainable(), policy.trainable(), strict=True):
            parameter.data = values.detach().clone()
        assert torch.equal(seen[-1], fresh(X, TIMESTEP, PROMPT))

    policy.accumulate([torch.ones_like(weight) for weight in policy.weights()])
    torch.optim.AdamW(policy.trainable(), lr=0.1, fused=True).step()
    changes()
    for parameter in policy.trainable():
        parameter.data = parameter.data + 0.1
    changes()
    for parameter in policy.trainable():
        parameter.data.add_(0.1)
    changes()


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


def outputs(policy: Policy) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output pair, gradient of its squares' sum in x, and in the trained parameters, from one graph."""
    x = X.clone().requires_grad_()
    output = policy(x, TIMESTEP, PROMPT)
    loss = output.float().square().sum()
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    trained = policy.trained()
    return output.detach(), gradient, dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("rank", [4, 0])
def test_constant_weights(rank):
    """The same output and gradient in x; none in the parameters, which come back as they were after an error."""
    policy = perturbed() if rank else build(rank=0)
    expected = outputs(policy)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="within"), policy.constant_weights():
        output = policy(x, TIMESTEP, PROMPT)
        output.square().sum().backward()
        raise RuntimeError("within")
    torch.testing.assert_close(output.detach(), expected[0])
    torch.testing.assert_close(x.grad, expected[1])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.trainable())
    frozen = [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    assert len(frozen) + len(policy.trainable()) == len(list(policy.parameters()))
    assert frozen, "those of the pretrained network"


def test_full_finetuning():
    """All parameters are trained; the reference stays where the policy began."""
    policy = build(rank=0)
    assert policy.trained().keys() == dict(UNet2DConditionModel.from_pretrained(UNET).named_parameters()).keys()
    condition = CONDITIONS[[0, 0, 0, 3, 1, 2]]
    expected = pretrained(torch.cat([X, X]), torch.cat([TIMESTEP, TIMESTEP]), condition)
    assert torch.equal(policy(X, TIMESTEP, PROMPT), expected)
    policy(X, TIMESTEP, PROMPT).square().mean().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable())
    torch.optim.SGD(policy.trainable(), lr=0.1).step()
    assert not torch.allclose(policy(X, TIMESTEP, PROMPT), expected)
    assert torch.equal(policy.reference(X, TIMESTEP, PROMPT), expected)
    with policy.pretrained_weights():
        assert torch.equal(policy(X, TIMESTEP, PROMPT), expected)


def test_full_finetuning_of_a_half_precision_network():
    """Computes in bfloat16 (to 5 % of float32's gradient), keeps master weights and gradients in float32."""
    torch.manual_seed(0)
    policy = Policy(
        UNet2DConditionModel.from_pretrained(UNET).bfloat16(), Conditions(CONDITIONS).bfloat16(), 5.0, rank=0
    )
    assert {parameter.dtype for parameter in policy.trainable()} == {torch.float32}
    assert {parameter.dtype for parameter in policy.pretrained.parameters()} == {torch.bfloat16}
    output, _, gradients = outputs(policy)
    assert (output.dtype, policy.reference(X, TIMESTEP, PROMPT).dtype) == (torch.bfloat16, torch.bfloat16)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    exact = outputs(build(rank=0))[2]
    flat, expected = (torch.cat([part[name].flatten() for name in exact]) for part in (gradients, exact))
    assert 1e-6 < relative_error(flat, expected) < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may run on a GPU")
def test_xformers_that_cannot_run():
    with pytest.raises(ValueError, match=r"^compute\.attention = 'xformers': .*--compute\.attention sdpa"):
        build().optimise(attention="xformers")


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["channels_last", "checkpoint"])
@pytest.mark.parametrize("rank", [4, 0])
def test_settings_change_rounding_alone(setting, rank):
    def policy():
        return perturbed() if rank else build(rank=0)

    optimised = policy()
    optimised.optimise(**{setting: True})
    output, gradient, gradients = outputs(optimised)
    expected_output, expected_gradient, expected = outputs(policy())
    assert relative_error(output, expected_output) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-5
    assert_gradients(gradients, expected)
    if setting == "channels_last":
        assert optimised.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert optimised.network.is_gradient_checkpointing == (setting == "checkpoint")


def test_saves_all_parameters_of_whatever_layout(tmp_path):
    policy = build(rank=0)
    policy.optimise(channels_last=True)
    save_policy(policy, tmp_path, torch.bfloat16)
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16)
    assert all(torch.equal(p, policy.trained()[name].bfloat16()) for name, p in saved.named_parameters())
    assert {parameter.dtype for parameter in policy.trainable()} == {torch.float32}


def test_a_fully_finetuned_network_has_memory_of_its_own() -> None:
    """A file's memory may be unaligned. A CPU rounds differently there, so that policy and reference would differ."""
    network = UNet2DConditionModel.from_pretrained(UNET)
    for parameter in network.parameters():
        parameter.data = torch.cat([torch.zeros(1), parameter.data.flatten()])[1:].view_as(parameter)
    policy = Policy(network, Conditions(CONDITIONS), 5.0, rank=0)
    assert all(weight.data_ptr() % 16 == 0 for weight in (*policy.trainable(), *policy.pretrained.parameters()))
    assert torch.equal(policy(X, TIMESTEP, PROMPT), policy.reference(X, TIMESTEP, PROMPT))
