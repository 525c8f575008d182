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
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from torch._dynamo.utils import counters

from fastnabla.models.compiling import compiled
from fastnabla.models.conditions import Conditions
from fastnabla.models.decoder import Decoder
from fastnabla.models.policy import Policy
from tests.checks import compiling_anew, randn, relative_error
from tests.golden import Flow, GoldenStep
from tests.kernel_cases import CPU, on_cpu, on_gpu
from tests.methods.test_sharing import batch
from tests.models.test_compiling import TINY
from tests.small_step import small_step, smallest_unet

DECODERS = ("kl", "kl recomputed", "tiny")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with compiling_anew(monkeypatch):
        yield


def build(device: str, dtype: torch.dtype, decoder: str, rank: int = 2) -> GoldenStep:
    """Networks none of whose layers is zero: a new LoRA's B is, and with it the gradient of A. The smallest on a CPU, where
    tracing takes long."""
    golden = small_step()
    torch.manual_seed(0)
    unet, flow, vae = smallest_unet(attention=True), golden.flow, golden.decoder.vae
    conditions = golden.policy.conditions
    if device == "cuda":
        unet, flow = (UNet2DConditionModel(**TINY, cross_attention_dim=conditions.width) for _ in range(2))
        flow, vae = Flow(flow), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    if decoder == "tiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        vae = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    policy = Policy(unet.to(dtype), conditions.to(dtype), guidance_scale=3.0, rank=rank)
    for parameter in policy.trainable():
        parameter.data = (parameter + 0.1 * torch.randn_like(parameter)).to(dtype)
    golden.reward.to(dtype)
    decoder = Decoder(vae.to(dtype), 2, decoder == "kl recomputed")
    return dataclasses.replace(golden, policy=policy, flow=flow.to(dtype), decoder=decoder).to(device)


def gradients(golden: GoldenStep, reward_gradient: str, backend: str) -> dict[str, Tensor]:
    device, dtype, transitions = golden.policy.conditions.device, golden.policy.dtype, batch(golden)
    fields = {field.name: getattr(transitions, field.name).to(device) for field in dataclasses.fields(transitions)}
    fields = {name: values.to(dtype) if values.is_floating_point() else values for name, values in fields.items()}
    golden.step(4, backend, reward_gradient=reward_gradient)(dataclasses.replace(transitions, **fields))
    trained = golden.policy.trained() | dict(golden.flow.named_parameters())
    return {name: parameter.grad.double().cpu() for name, parameter in trained.items()}


@functools.cache
def expected(device: str, reward_gradient: str, decoder: str, rank: int = 2) -> dict[str, Tensor]:
    return gradients(build(device, torch.float64, decoder, rank), reward_gradient, "torch")


def compile_as(golden: GoldenStep, compile: str) -> None:
    """As `fastnabla.models.build.build_networks` does."""
    decoder, whole = golden.decoder, compile == "whole"
    golden.decoder = Decoder(decoder.vae, decoder.chunk, decoder.checkpoint, whole)
    if whole:
        golden.flow.forward = compiled(golden.flow.forward)


def check(
    device: str, compile: str, reward_gradient: str, checkpoint: bool, backend: str, decoder: str, rank: int = 2
) -> None:
    wanted = expected(device, reward_gradient, decoder, rank)
    dtype, tolerance = torch.float64, 1e-9
    if backend == "triton":
        dtype, tolerance = torch.float32, 1e-2 if device == "cuda" else 1e-3
    golden = build(device, dtype, decoder, rank)
    golden.policy.optimise(compile, checkpoint=checkpoint)
    compile_as(golden, compile)
    actual = gradients(golden, reward_gradient, backend)
    assert (counters["stats"]["unique_graphs"] > 0) == (compile != "none")
    largest = max(tensor.norm() for tensor in wanted.values())
    for name, tensor in wanted.items():
        if tensor.norm() > 1e-9 * largest:  # biases before a normalisation have gradients of rounding alone
            assert actual[name].any(), f"{name} is zero"
            assert relative_error(actual[name], tensor) < tolerance, name


REWARD_GRADIENTS = ("lookahead", "lookahead_detached", "terminal")
CASES = [
    (compile, reward_gradient, checkpoint, backend, DECODERS[(place + (compile == "whole")) % 3])
    for compile in ("none", "blocks", "whole")
    for place, reward_gradient in enumerate(REWARD_GRADIENTS)
    for checkpoint in (False, True)
    for backend in ("torch", "triton")
    if compile == "none" or (backend == "triton") == checkpoint
]
TRACED = {
    ("blocks", "lookahead", True),
    ("blocks", "terminal", False),
    ("whole", "lookahead", False),
    ("whole", "lookahead_detached", True),
}
"""What of the compiled ones is tested on a CPU, where tracing takes long: no reward gradient makes a graph that look-ahead does
not, and how activations are kept, the backend and the decoder do not meet in one."""
UNCOMPILED = {
    ("none", reward_gradient, checkpoint, "triton" if (place + checkpoint) % 2 else "torch")
    for place, reward_gradient in enumerate(REWARD_GRADIENTS)
    for checkpoint in (False, True)
}
"""Every two of these settings meet."""
ON_CPU = [case for case in CASES if case[:4] in UNCOMPILED or case[:3] in TRACED]
ON_GPU = [
    case
    for case in CASES
    if case[:3]
    in {
        ("none", "lookahead", True),
        ("blocks", "lookahead_detached", True),
        ("blocks", "terminal", False),
        ("whole", "lookahead", False),
        ("whole", "terminal", False),
    }
]
SETTINGS = ("compile", "reward_gradient", "checkpoint", "backend", "decoder")


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize(SETTINGS, ON_CPU)
def test_gradients(
    compile: str, reward_gradient: str, checkpoint: bool, backend: str, decoder: str, device: str
) -> None:
    check(device, compile, reward_gradient, checkpoint, backend, decoder)


@on_gpu
@pytest.mark.parametrize(SETTINGS, ON_GPU)
def test_gradients_on_a_gpu(
    compile: str, reward_gradient: str, checkpoint: bool, backend: str, decoder: str, device: str
) -> None:
    check(device, compile, reward_gradient, checkpoint, backend, decoder)


@pytest.mark.slow
@on_cpu
def test_convolutions_without_guidance_in_half_precision(device: str) -> None:
    """A LoRA on convolutions too, one row a transition, bfloat16, whose sums in another order are off by some 2⁻⁸."""

    def gradients(compile: str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        unet = smallest_unet(attention=True).bfloat16()
        targets = ("to_q", "to_out.0", "conv1")
        policy = Policy(unet, Conditions(randn(3, 7, 16).bfloat16()), None, rank=2, targets=targets).to(device)
        for parameter in policy.trainable():
            parameter.data += 0.1 * torch.randn_like(parameter)
        policy.optimise(compile)
        x, timestep, prompt = randn(3, 4, 8, 8).requires_grad_(), torch.tensor([901, 501, 1]), torch.tensor([0, 1, 0])
        output = policy(x, timestep, prompt)
        return torch.autograd.grad(output.float().square().sum(), [x, *policy.weights()])

    for actual, wanted in zip(gradients("blocks"), gradients("none"), strict=True):
        assert actual.any() and relative_error(actual, wanted) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compile", "device"),
    [
        pytest.param("blocks", "cpu", marks=CPU.marks),
        *(pytest.param(c, "cuda", marks=pytest.mark.gpu) for c in ("blocks", "whole")),
    ],
)
def test_gradients_of_all_weights(compile: str, device: str) -> None:
    """Constant in one pass, trained in the next."""
    check(device, compile, "lookahead", False, "torch", "kl", rank=0)
