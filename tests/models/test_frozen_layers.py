"""Layers with constant weights against torch's own and autograd, in either layout."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastnabla.models.frozen_layers import convolve, memory_format, norm_silu, norm_silu_and_input
from tests.checks import randn, relative_error
from tests.kernel_cases import on_each_device

LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
in_each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def norm(groups: int, channels: int, **options) -> nn.GroupNorm:
    layer = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    layer.weight.copy_(1 + 0.3 * randn(channels, seed=1))
    layer.bias.copy_(0.3 * randn(channels, seed=2))
    return layer.to(**options)


def derivatives(function, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent.clone())[0]


@on_each_device
@in_each_layout
@pytest.mark.parametrize(
    ("groups", "shape"), [(2, (3, 6, 5, 7)), (1, (1, 4, 2, 2)), (4, (2, 4, 3, 3)), (32, (1, 64, 1, 9))], ids=str
)
def test_norm_silu(groups: int, shape: tuple[int, ...], layout: torch.memory_format, device: str) -> None:
    """Equal to autograd in float64, to 1e-12, with a residual connection around the layer and without."""
    layer = norm(groups, shape[1], device=device, dtype=torch.float64)
    x, cotangent = (randn(*shape, seed=seed, dtype=torch.float64).to(device) for seed in (3, 4))
    x = (2 * x + 1).to(memory_format=layout)

    def around(x: Tensor) -> Tensor:
        y, x = norm_silu_and_input(layer, x)
        return 3 * x + y

    pairs = (
        (lambda x: norm_silu(layer, x), lambda x: functional.silu(layer(x))),
        (around, lambda x: 3 * x + functional.silu(layer(x))),
    )
    for ours, torchs in pairs:
        expected, actual = (derivatives(function, x, cotangent) for function in (torchs, ours))
        for tensor, reference in zip(actual, expected, strict=True):
            assert tensor.is_contiguous(memory_format=layout)
            assert relative_error(tensor, reference) < 1e-12


@on_each_device
@in_each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_silu_in_half_precision(dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
    """No further from float64 than twice torch's own kernels, with a mean of 4 standard deviations."""
    x, cotangent = 4 + randn(2, 64, 16, 16, seed=3), randn(2, 64, 16, 16, seed=4)
    x, cotangent = (tensor.to(device, dtype) for tensor in (x, cotangent))
    layer = norm(8, 64, device=device, dtype=dtype)
    exact = norm(8, 64).to(dtype).to(device, torch.float64)
    expected = derivatives(lambda x: functional.silu(exact(x)), x.double(), cotangent.double())
    plain = derivatives(lambda x: functional.silu(layer(x)), x, cotangent)
    actual = derivatives(lambda x: norm_silu(layer, x), x.to(memory_format=layout), cotangent)
    for tensor, torchs, reference in zip(actual, plain, expected, strict=True):
        assert tensor.dtype == dtype
        assert relative_error(tensor, reference) < 2 * relative_error(torchs, reference)


@in_each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constant_images_give_finite_numbers(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """The variance is 0, and its rounding error, of up to 100² · 2⁻²⁴ of either sign, is far above eps."""
    layer = norm(2, 8, dtype=dtype)
    x = torch.arange(96, 112).repeat_interleave(8).view(16, 8, 1, 1).expand(-1, -1, 15, 17).to(dtype)
    x = x.contiguous(memory_format=layout)
    y, gradient = derivatives(lambda x: norm_silu(layer, x), x, torch.ones_like(x))
    assert y.isfinite().all()
    assert gradient.isfinite().all()


@on_each_device
@in_each_layout
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0)], ids=["3x3", "1x1"])
def test_convolve(kernel: int, padding: int, layout: torch.memory_format, device: str) -> None:
    """Equal to autograd in float64, to 1e-12; a gradient that comes in the other layout is taken into x's."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, kernel, padding=padding, dtype=torch.float64).requires_grad_(False)
    layer.to(device, memory_format=layout)
    x, cotangent = (randn(2, n, 5, 7, seed=n, dtype=torch.float64).to(device) for n in (4, 6))
    expected = derivatives(layer, x, cotangent)
    actual = derivatives(lambda x: convolve(layer, x), x.to(memory_format=layout), cotangent)
    for tensor, reference in zip(actual, expected, strict=True):
        assert tensor.is_contiguous(memory_format=layout)
        assert relative_error(tensor, reference) < 1e-12


def test_memory_format() -> None:
    x = torch.ones(2, 3, 4, 5)
    assert memory_format(x) == torch.contiguous_format
    assert memory_format(x.to(memory_format=torch.channels_last)) == torch.channels_last
    assert memory_format(torch.ones(2, 1, 4, 5)) == torch.contiguous_format, "it is both"
    assert memory_format(x.transpose(2, 3)) == torch.contiguous_format, "it is neither"
