"""The adapter against PEFT's own layer, and what it keeps for the backward pass."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from fastnabla.models.lora import ADAPTER, LoraLinear, add_lora
from tests.checks import randn, relative_error
from tests.golden import STEP_SETS

INSIDE, OUTSIDE, RANK = 32, 48, 4
X, G = randn(2, 8, INSIDE, seed=5), randn(2, 8, OUTSIDE, seed=6)


def layer(kind: type[Linear], dtype: torch.dtype, bias: bool = True) -> Linear:
    """An adapted layer whose A and B are float32 (in float64: float64), and both other than 0."""
    torch.manual_seed(0)
    base = nn.Linear(INSIDE, OUTSIDE, bias=bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian")
    adapted = kind(base, ADAPTER, config=config, r=RANK, lora_alpha=RANK, init_lora_weights="gaussian")
    master = torch.float64 if dtype == torch.float64 else torch.float32
    for part, seed in ((adapted.lora_A, 1), (adapted.lora_B, 2)):
        weight = part[ADAPTER].weight
        weight.data = randn(*weight.shape, seed=seed, dtype=torch.float64).mul(0.3).to(master)
    return adapted


def results(adapted: Linear) -> dict[str, Tensor]:
    """The output at `X`, and the gradients that `G` leads to."""
    x = X.to(adapted.base_layer.weight.dtype).requires_grad_()
    y = adapted(x)
    down, up = (part[ADAPTER].weight for part in (adapted.lora_A, adapted.lora_B))
    gradients = torch.autograd.grad(y, (x, down, up), G.to(y.dtype))
    return dict(zip(("y", "x", "A", "B"), (y.detach(), *gradients), strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_equals_pefts_layer_in_float32(bias: bool) -> None:
    ours, theirs = (results(layer(kind, torch.float32, bias)) for kind in (LoraLinear, Linear))
    for name, value in theirs.items():
        assert relative_error(ours[name], value) < 1e-6, name


def test_equals_the_formula_in_float64() -> None:
    adapted = layer(LoraLinear, torch.float64)
    w, bias = adapted.base_layer.weight, adapted.base_layer.bias
    a, b = adapted.lora_A[ADAPTER].weight.detach(), adapted.lora_B[ADAPTER].weight.detach()
    x, g = X.double().flatten(0, 1), G.double().flatten(0, 1)
    expected = {"y": x @ (w + b @ a).T + bias, "x": g @ (w + b @ a), "A": b.T @ g.T @ x, "B": g.T @ x @ a.T}
    for name, value in results(adapted).items():
        torch.testing.assert_close(value.flatten(0, -2) if value.dim() == 3 else value, expected[name])


def kept_bytes(adapted: Linear) -> int:
    """Of the tensors kept for the backward pass, each storage once, but for x and the parameters."""
    x = X.to(adapted.base_layer.weight.dtype).requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *adapted.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = adapted(x)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in known)


def test_keeps_less_in_bfloat16() -> None:
    """A, B and A x in bfloat16; PEFT keeps x and A x in float32."""
    rows = X.shape[0] * X.shape[1]
    assert kept_bytes(layer(LoraLinear, torch.bfloat16)) == 2 * RANK * (INSIDE + OUTSIDE + rows)
    assert kept_bytes(layer(Linear, torch.bfloat16)) >= 4 * rows * (INSIDE + RANK)


def test_gradients_in_bfloat16_are_float32_and_close() -> None:
    """bfloat16 rounds each factor by up to 2⁻⁹; two or three of them, then sums over rows: within 2 %."""
    ours, exact = results(layer(LoraLinear, torch.bfloat16)), results(layer(LoraLinear, torch.float64))
    assert (ours["y"].dtype, ours["x"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert (ours["A"].dtype, ours["B"].dtype) == (torch.float32, torch.float32)
    for name, value in exact.items():
        assert relative_error(ours[name], value) < 0.02, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_adapter_leaves_the_layer_to_the_bit(dtype: torch.dtype) -> None:
    adapted, x = layer(LoraLinear, dtype), X.to(dtype)
    expected = adapted.base_layer(x)
    assert not torch.equal(adapted(x), expected)
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), expected)
    adapted.enable_adapters(True)
    assert not torch.equal(adapted(x), expected)


def test_add_lora_takes_named_layers_alone() -> None:
    plain = UNet2DConditionModel.from_pretrained(STEP_SETS[0] / "unet").bfloat16().requires_grad_(False)
    unet = copy.deepcopy(plain)
    add_lora(unet, RANK, ("to_q", "conv1"))
    adapted = {n for n, module in unet.named_modules() if isinstance(module, LoraLinear)}
    assert adapted == {name for name, _ in plain.named_modules() if name.endswith(".to_q")} != set()
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == {"to_q", "conv1"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(p.any() == ("lora_A" in name) for name, p in trained.items())
    with pytest.raises(ValueError, match="nothing"):
        add_lora(copy.deepcopy(plain), RANK, ("nothing",))
