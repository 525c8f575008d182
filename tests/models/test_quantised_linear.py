"""Quantised layers: their codes by definition, their products and a training step as those of a plain network that holds Ŵ."""

import copy
import dataclasses
import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.conditions import Conditions
from fastnabla.models.families import FAMILIES
from fastnabla.models.pipeline import network_of, pipeline_of, text_encoders
from fastnabla.models.policy import Policy
from fastnabla.models.quantised_linear import (
    QuantisedLinear,
    dequantise,
    quantise,
    quantise_linear_layers,
    quantised_layers,
    quantised_product,
    weight_bytes,
)
from fastnabla.models.saved_policy import load_policy, save_policy
from tests.checks import assert_gradients, compiler_settings, randn
from tests.families import save_tiny
from tests.golden import GoldenStep
from tests.methods.test_sharing import gradients
from tests.small_step import small_step, smallest_unet

KINDS = ("int8", "nf4")
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of the paper's appendix E (arXiv 2305.14314)."""


def plain(network: nn.Module) -> nn.Module:
    """A copy of a quantised network with `nn.Linear` layers that hold Ŵ."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, QuantisedLinear):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
                dense.weight = nn.Parameter(layer.weight, requires_grad=False)
                dense.bias = layer.bias
                setattr(module, name, dense)
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rounds_to_127_steps_of_a_row_s_largest_weight(dtype: torch.dtype) -> None:
    weight = randn(6, 41).to(dtype)
    weight[2] = 0
    codes, scales = quantise(weight, "int8")
    assert codes.dtype == torch.int8 and torch.equal(scales[:, 0], weight.float().abs().amax(1) / 127)
    # Half a step, and the rounding of codes · scales to 24 bits; to 8 bits for bfloat16.
    error = (dequantise(codes, scales, dtype).double() - weight.double()).abs()
    assert (error <= (0.5 + 127 * torch.finfo(dtype).eps) * scales.double()).all()
    assert codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]


@pytest.mark.parametrize("shape", [(8, 64), (7, 30), (3, 10)])
def test_nf4_takes_the_nearest_of_16_values_in_blocks_of_64(shape: tuple[int, int]) -> None:
    weight = randn(*shape)
    found = dequantise(*quantise(weight, "nf4"), torch.float32)
    for block, own in zip(weight.flatten().split(64), found.flatten().split(64), strict=True):
        values = torch.tensor(NF4) * block.abs().max()
        nearest = (block[:, None] - values).abs().min(1)
        torch.testing.assert_close(own, values[nearest.indices], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "dtype"), itertools.product(KINDS, (torch.float32, torch.bfloat16)))
def test_a_product_is_that_of_a_linear_layer_with_the_dequantised_weights(kind: str, dtype: torch.dtype) -> None:
    """To the bit: output, gradient, and the gradient of the gradient. The graph keeps no activation, and no Ŵ."""
    layer = QuantisedLinear(nn.Linear(40, 24, dtype=dtype).requires_grad_(False), kind)
    dense, x, v = plain(nn.Sequential(layer))[0], randn(2, 3, 40).to(dtype), randn(2, 3, 24, seed=1).to(dtype)

    def results(layer: nn.Module) -> list[Tensor]:
        inputs, towards = x.clone().requires_grad_(), v.clone().requires_grad_()
        output = layer(inputs)
        (gradient,) = torch.autograd.grad(output, inputs, towards, create_graph=True)
        return [output, gradient, *torch.autograd.grad(gradient.square().sum(), towards)]

    assert all(map(torch.equal, results(layer), results(dense)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        layer(x.clone().requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {layer.codes.data_ptr(), layer.scales.data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_operation_is_registered_correctly(kind: str) -> None:
    codes, scales = quantise(randn(24, 40), kind)
    for arguments in (
        (randn(3, 40).requires_grad_(), codes, scales, randn(24), False),
        (randn(3, 24), codes, scales, None, True),
    ):
        torch.library.opcheck(quantised_product, arguments)


def quantised(golden: GoldenStep, kind: str) -> tuple[GoldenStep, GoldenStep]:
    """The step with quantised weights, and with plain layers that hold Ŵ. Neither LoRA is new."""

    def with_network(network: nn.Module) -> GoldenStep:
        torch.manual_seed(0)
        policy = Policy(network, golden.policy.conditions, golden.policy.guidance_scale, rank=2)
        for parameter in policy.trainable():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return dataclasses.replace(golden, policy=policy)

    network = smallest_unet(attention=True)
    quantise_linear_layers(network, kind)
    dense = plain(network)
    return with_network(network), with_network(dense)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "objective"),
    [("int8", {}), ("nf4", {"reverse_second_order": True}), ("nf4", {"reverse_target": "reference"})],
)
def test_a_step_is_that_of_a_plain_network_with_the_dequantised_weights(kind: str, objective: dict) -> None:
    """The products are equal to the bit, so the gradients are within float32 rounding."""
    ours, theirs = quantised(small_step(), kind)
    found, expected = (gradients(each, each.step(4, **objective), each.transitions) for each in (ours, theirs))
    assert all(gradient.any() for gradient in found.values())
    assert_gradients(found, expected)


@pytest.mark.slow
def test_a_compiled_network_keeps_no_dequantised_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without breaks; the output, and both gradients, of a plain network that is not compiled. Between forward and
    backward pass it keeps codes where the plain network keeps weights."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch.manual_seed(0)
    network, conditions = smallest_unet(attention=True), Conditions(randn(3, 5, 16))
    quantise_linear_layers(network, "nf4")
    dense, layers = plain(network), list(quantised_layers(network))
    shapes, codes = ({getattr(layer, name).shape for layer in layers} for name in ("weight", "codes"))
    results, kept = {}, {}
    torch._dynamo.reset()
    with compiler_settings():
        for compile, each in (("whole", network), ("none", dense)):
            torch.manual_seed(0)
            policy = Policy(each, conditions, 3.0, rank=2)
            for parameter in policy.trainable():
                parameter.data += 0.1 * torch.randn_like(parameter)
            policy.optimise(compile=compile)
            x, saved = randn(1, 4, 8, 8).requires_grad_(), []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, to=saved: to.append(tensor) or tensor, lambda t: t
            ):
                output = policy(x, torch.tensor([901.0]), torch.tensor([0]))
            inputs = [x, *policy.weights()]
            results[compile] = [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]
            kept[compile] = {(tensor.is_floating_point(), tensor.shape) for tensor in saved}
    torch._dynamo.reset()
    torch.testing.assert_close(results["whole"], results["none"], rtol=1e-4, atol=1e-5)
    weights, of_codes = ({(kind, shape) for shape in of} for kind, of in ((True, shapes), (False, codes)))
    assert kept["none"] & weights and not kept["whole"] & weights
    assert kept["whole"] & of_codes and not kept["none"] & of_codes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd35", "flux"])
def test_network_and_text_encoders_of_each_family(family: str, tmp_path: Path) -> None:
    """All linear layers, the same codes each time. Prompts are encoded, and the network called, as with plain layers that
    hold Ŵ."""
    model = ModelConfig(name=save_tiny(family, tmp_path), dtype="float32", quantise="nf4")
    pipeline, again = pipeline_of(model), pipeline_of(model)
    network, family = network_of(pipeline), FAMILIES[type(pipeline).__name__]
    dense = plain(network)
    for part in (network, *text_encoders(pipeline)):
        assert {type(m) for m in part.modules() if isinstance(m, nn.Linear)} == {QuantisedLinear}
        assert weight_bytes(part) < weight_bytes(plain(part))
    for ours, theirs in zip(network.buffers(), network_of(again).buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert network.dtype == torch.float32 and not any(p.requires_grad for p in network.parameters())

    text = family.encode(pipeline, ["a cat"])
    for name in family.text_encoders:
        setattr(again, name, plain(getattr(pipeline, name)))
    assert all(map(torch.equal, text, family.encode(again, ["a cat"])))

    x = randn(1, family.channels(network.config), 8, 8).requires_grad_()
    conditions = dict(zip(("text", "pooled"), text, strict=False)) | family.size_input((16, 16), torch.float32)
    conditions |= family.guidance_input(network, 3.0)
    conditions = {
        name: value.expand(1, *value.shape[value.ndim > 1 and len(value) == 1 :]) for name, value in conditions.items()
    }
    results = []
    for each in (network, dense):
        output = family.call(each, x, torch.tensor([500.0]), conditions)
        results.append((output, *torch.autograd.grad(output, x, torch.ones_like(output))))
    assert all(map(torch.equal, *results))


@pytest.mark.slow
def test_a_saved_lora_loads_into_the_quantised_pipeline(tmp_path: Path) -> None:
    """Nothing but the LoRA is saved. diffusers' layers compute what the policy does, to float32 rounding."""
    model = ModelConfig(name=save_tiny("sd15", tmp_path), dtype="float32", quantise="nf4")
    pipeline, other = pipeline_of(model), pipeline_of(model)
    policy = Policy(network_of(pipeline), Conditions(randn(3, 77, 16)), None, rank=2)
    for parameter in policy.trainable():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_policy(policy, tmp_path / "run", torch.float32)
    assert [path.name for path in (tmp_path / "run").rglob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]
    load_policy(other, tmp_path / "run")
    x, t, prompt = randn(2, 4, 8, 8), torch.tensor([901.0, 1.0]), torch.tensor([0, 1])
    with torch.no_grad():
        found = network_of(other)(x, t, policy.conditions.text[1 + prompt]).sample
        torch.testing.assert_close(found, policy(x, t, prompt), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, policy.reference(x, t, prompt), atol=1e-3)


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^model\.quantise = 'int8': Sequential has no linear layers.*use 'none'"):
        quantise_linear_layers(nn.Sequential(nn.Conv2d(4, 4, 1)), "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^model\.quantise = 'nf4': .* pip install bitsandbytes\. Or use 'int8'"):
        quantise_linear_layers(nn.Sequential(nn.Linear(4, 4)), "nf4")
    quantise_linear_layers(network := nn.Sequential(nn.Linear(4, 4)), "int8")
    assert network(randn(2, 4)).shape == (2, 4)
