"""Times the decoder's normalisation with its SiLU, forward and backward to its input, with the gradient of the shortcut around it.

Before a provider is timed, its result and gradient are compared with torch's layers in float64 (`TOLERANCE`). If they differ,
the benchmark fails. The providers:

- torch, NCHW: GroupNorm and SiLU in eager torch, as in diffusers' decoder; also in channels-last, and that compiled;
- plain: fastnabla without its kernel (`fastnabla.models.group_norm_silu`), in channels-last;
- fastnabla: the Triton kernel.

On CUDA in bfloat16: the inputs of Stable Diffusion's decoder at 512², one image; compiled only the largest. GB/s: the kernel's own
bytes (`fastnabla.kernels.group_norm_silu`, 9 passes over an activation) by each provider's time on the device. On a CPU, at toy
size in float32, the kernel runs in a dry run only.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench import measure, rows
from fastnabla.models.group_norm_silu import PLAIN, GroupNormSiLU, select

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
DTYPE, GROUPS, EPS = (torch.bfloat16, 32, 1e-6) if CUDA else (torch.float32, 4, 1e-6)
SHAPES = ((128, 512), (256, 512), (256, 256), (512, 256), (512, 128), (512, 64)) if CUDA else ((16, 16),)
"""Channels, and height and width."""
PASSES = 9
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative norm of an error. torch's layers round between normalisation and SiLU."""
Results = tuple[Tensor, Tensor]


def layers(x: Tensor, gradient: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Results:
    """The result, and the gradient in x."""
    x = x.detach().requires_grad_()
    y = functional.silu(functional.group_norm(x, GROUPS, weight, bias, EPS))
    return y.detach(), torch.autograd.grad(y, x, gradient)[0] + skip


def ours(by: GroupNormSiLU, x: Tensor, gradient: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Results:
    """The same. Timed calls overwrite the gradient, whose values do not matter for the time."""
    y, mean, rstd = by.forward(x, weight, bias, GROUPS, EPS)
    with torch.no_grad():
        return y, by.backward(gradient, x, mean, rstd, weight, bias, GROUPS, EPS, skip)


def compiled() -> Callable[..., Results]:
    torch._dynamo.reset()
    forward = torch.compile(lambda x, w, b: functional.silu(functional.group_norm(x, GROUPS, w, b, EPS)), dynamic=False)

    def run(x: Tensor, gradient: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Results:
        x = x.detach().requires_grad_()
        y = forward(x, weight, bias)
        return y.detach(), torch.autograd.grad(y, x, gradient)[0] + skip

    return run


def kernel() -> Callable[..., Results]:
    return functools.partial(ours, select("triton" if rows.is_dry() else "auto", DEVICE, DTYPE))


PROVIDERS: dict[str, tuple[torch.memory_format, Callable[[], Callable[..., Results]]]] = {
    "torch, NCHW": (torch.contiguous_format, lambda: layers),
    "torch, channels-last": (torch.channels_last, lambda: layers),
    "plain": (torch.channels_last, lambda: functools.partial(ours, PLAIN)),
    "fastnabla": (torch.channels_last, kernel),
    "compiled torch, channels-last": (torch.channels_last, compiled),
}


def cases() -> Iterator[tuple[tuple[int, int], str]]:
    for shape in SHAPES:
        for name in PROVIDERS:
            if not name.startswith("compiled"):
                yield shape, name
    if CUDA:
        yield SHAPES[0], "compiled torch, channels-last"


def inputs(shape: tuple[int, int], layout: torch.memory_format) -> list[Tensor]:
    """x, the gradients of the result and of the shortcut, weight and bias."""
    channels, size = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE).to(DTYPE)

    images = [normal(1, channels, size, size).contiguous(memory_format=layout) for _ in range(3)]
    return [*images, 1 + 0.1 * normal(channels), 0.1 * normal(channels)]


@pytest.mark.parametrize(("shape", "name"), list(cases()), ids=str)
def bench_group_norm_silu(benchmark, shape: tuple[int, int], name: str) -> None:
    layout, provider = PROVIDERS[name]
    with measure.own_stream():
        run, tensors = provider(), inputs(shape, layout)
        exact = layers(*(tensor.double() for tensor in tensors))
        x, gradient, *others = tensors
        pairs = list(zip(run(x, gradient.clone(), *others), exact, strict=True))
        error = max(((actual - truth).norm() / truth.norm()).item() for actual, truth in pairs)
        del exact, pairs
        assert error < TOLERANCE[DTYPE], f"{name}: the error is {error:.2g}"
        call = functools.partial(run, *tensors)
        benchmark.group = f"{shape[0]} channels, {shape[1]}², {DTYPE}"
        benchmark.pedantic(measure.synchronised(call), rounds=20 if CUDA else 3, warmup_rounds=3 if CUDA else 0)
        if benchmark.stats is None:  # --benchmark-disable
            return
        info: dict[str, Any] = {"peak MiB": measure.peak_memory(call), "us": measure.time_cuda(call)}
    microseconds = info["us"] or 1e6 * benchmark.stats.stats.median
    gigabytes = PASSES * tensors[0].nbytes / microseconds / 1e3
    copy = measure.copy_bandwidth(DEVICE)
    info |= {"error": error, "GB/s": gigabytes, "of copy": gigabytes / copy, "row": f"{name}, {shape[0]} × {shape[1]}²"}
    benchmark.extra_info |= {**info, "device": measure.device_info()}
