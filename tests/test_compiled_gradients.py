"""Each way of computing that a preset or the planner can choose gives the gradients of the plain one, and none is zero.

Compiled or not, recomputed or not, each decoder, each gradient of the reward, each backend. On a CPU torch.compile stops
before it generates code (`aot_eager`): what is tested is what it traces, guards and differentiates. On a GPU it does all.

In float64 two orders of summation agree to 1e-9 of each tensor. The kernels compute in float32, where the residual at
small σ magnifies rounding: 1e-3 on a CPU, and 1e-2 with a GPU's convolutions.
"""

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from torch._dynamo.utils import counters

from fastnabla.compiling import compiled
from fastnabla.decoder import Decoder
from fastnabla.policy import Policy
from tests.checks import relative_error
from tests.golden import GoldenStep, load_step
from tests.kernel_cases import on_each_device
from tests.test_compiling import TINY
from tests.test_sharing import GOLDEN, batch, gradients

GUIDANCE = ("lookahead", "lookahead_detached", "terminal")
DECODERS = ("kl", "kl recomputed", "tiny")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, and nothing left."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._functorch.config.patch(), torch._dynamo.config.patch():
        yield
    torch._dynamo.reset()


def build(device: str, dtype: torch.dtype, decoder: str, rank: int = 2) -> GoldenStep:
    """Tiny networks with another LoRA than a new one, whose B is zero and A without gradient."""
    golden = load_step(GOLDEN)
    conditions = golden.policy.conditions
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY, cross_attention_dim=conditions.width)
    policy = Policy(unet.to(dtype), conditions.to(dtype), guidance_scale=3.0, rank=rank)
    for parameter in policy.trainable():
        parameter.data = (parameter + 0.1 * torch.randn_like(parameter)).to(dtype)
    vae = golden.decoder.vae
    if decoder == "tiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        vae = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    golden.flow.to(dtype), golden.reward.to(dtype)
    golden = dataclasses.replace(golden, policy=policy, decoder=Decoder(vae.to(dtype), 2, decoder == "kl recomputed"))
    return golden.to(device)


def result(golden: GoldenStep, guidance: str, backend: str) -> dict[str, Tensor]:
    device, dtype = golden.policy.conditions.device, golden.policy.dtype
    transitions = batch(golden)
    fields = {field.name: getattr(transitions, field.name).to(device) for field in dataclasses.fields(transitions)}
    fields = {name: values.to(dtype) if values.is_floating_point() else values for name, values in fields.items()}
    found = gradients(golden, golden.step(4, backend, guidance=guidance), dataclasses.replace(transitions, **fields))
    return {name: gradient.double().cpu() for name, gradient in found.items()}


@functools.cache
def expected(device: str, guidance: str, decoder: str, rank: int = 2) -> dict[str, Tensor]:
    return result(build(device, torch.float64, decoder, rank), guidance, "torch")


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    largest = max(tensor.norm() for tensor in wanted.values())
    for name, tensor in wanted.items():
        if tensor.norm() > 1e-9 * largest:  # biases before a normalisation have gradients of rounding alone
            assert actual[name].any(), f"{name} is zero"
            assert relative_error(actual[name], tensor) < tolerance, name


def compile_as(golden: GoldenStep, compile: str) -> None:
    """As `fastnabla.networks.build_networks` does."""
    decoder, whole = golden.decoder, compile == "whole"
    golden.decoder = Decoder(decoder.vae, decoder.chunk, decoder.checkpoint, whole)
    if whole:
        golden.flow.forward = compiled(golden.flow.forward)


@on_each_device
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("compile", ["none", "blocks", "whole"])
def test_gradients(compile: str, guidance: str, checkpoint: bool, backend: str, device: str) -> None:
    if compile != "none" and (backend == "triton") != checkpoint:
        pytest.skip("compiled, each backend is tested with one of the two: they do not meet in a graph")
    decoder = DECODERS[(GUIDANCE.index(guidance) + 2 * checkpoint + (compile == "whole")) % 3]
    dtype, tolerance = (
        (torch.float64, 1e-9) if backend == "torch" else (torch.float32, 1e-2 if device == "cuda" else 1e-3)
    )
    golden = build(device, dtype, decoder)
    golden.policy.optimise(compile, checkpoint=checkpoint)
    compile_as(golden, compile)
    actual = result(golden, guidance, backend)
    assert (counters["stats"]["unique_graphs"] > 0) == (compile != "none")
    assert_same(actual, expected(device, guidance, decoder), tolerance)


@on_each_device
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_gradients_of_all_weights(compile: str, device: str) -> None:
    """Constant in one pass, trained in the next."""
    golden = build(device, torch.float64, "kl", rank=0)
    golden.policy.optimise(compile)
    assert_same(result(golden, "lookahead", "torch"), expected(device, "lookahead", "kl", 0), 1e-9)
