"""Layers with frozen weights that are differentiated only with respect to their input. They keep fewer activations than
torch's layers.

Results and gradients have the input's layout, NCHW or channels-last. torch's own operations do not preserve it:
`conv2d_input` passes cuDNN a placeholder of neither layout, so a channels-last gradient is copied to NCHW and back. On
CUDA, `native_group_norm` copies to NCHW (torch 2.13, `group_norm.cpp`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastnabla.objective.gaussian import full


def memory_format(x: Tensor) -> torch.memory_format:
    """`torch.channels_last` if `x` is channels-last and not also contiguous, else `torch.contiguous_format`."""
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """`layer(x)` for a stride of 1, without keeping x for the backward pass."""
    return _Convolution.apply(x, layer.weight, layer.bias, layer.padding)


def norm_silu(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """`silu(layer(x))`. Keeps x and the moments of its groups, and recomputes the normalisation in the backward pass."""
    function = _ChannelsLastNormSiLU if memory_format(x) == torch.channels_last else _NormSiLU
    return function.apply(x, layer.weight, layer.bias, layer.num_groups, layer.eps)


class _Convolution(torch.autograd.Function):
    """The weights are not saved tensors: checkpointing would otherwise recompute a block past its last normalisation, only to
    save them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.weight, ctx.padding, ctx.memory_format = weight, padding, memory_format(x)
        return functional.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=ctx.memory_format)
        return functional.conv_transpose2d(gradient, ctx.weight, padding=ctx.padding), None, None, None


class _NormSiLU(torch.autograd.Function):
    """For x in NCHW, with torch's kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous()
        sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups)
        normalised, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.weight, ctx.bias, ctx.sizes, ctx.eps = weight, bias, sizes, eps
        return _silu(normalised)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        normalised = torch.native_group_norm(x, ctx.weight, ctx.bias, *ctx.sizes, ctx.eps)[0]
        gradient = _silu_backward(gradient.contiguous(), normalised)
        moments = (x, mean, rstd, ctx.weight, *ctx.sizes)
        x = torch.ops.aten.native_group_norm_backward(gradient, *moments, (True, False, False))[0]
        return x, None, None, None, None


class _ChannelsLastNormSiLU(torch.autograd.Function):
    """For x in channels-last. For each row and channel, with scale = rstd · weight and shift = bias − mean · scale,

        y = scale x + shift
        ∂x = scale ∂y + slope x + offset
        slope = rstd³ (mean ⟨weight ∂y⟩ − ⟨weight ∂y x⟩),  offset = −rstd ⟨weight ∂y⟩ − mean · slope

    where ⟨·⟩ is the mean over a group. Each channel's pixels are averaged first, since channels are adjacent in memory.
    Moments, sums and coefficients are in `full` precision. In eager half precision this reads or writes an activation 6 times
    forward and 15 times backward (`_NormSiLU` on CUDA: 5 and 11); a fused kernel each way would need 3 and 5.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        weight, bias = (full(tensor).view(groups, -1) for tensor in (weight, bias))
        mean, rstd = _group_moments(x, groups, eps)
        scale = rstd * weight
        scale, shift = _by_channel(x, scale, torch.addcmul(bias, mean, scale, value=-1))
        ctx.save_for_backward(x, mean, rstd, scale, shift)
        ctx.weight = weight
        return _silu(_affine(scale, x, shift))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        gradient = _silu_backward(gradient, _affine(scale, x, shift))
        average = _group_mean(ctx.weight, gradient)
        slope = rstd.pow(3) * (mean * average - _group_mean(ctx.weight, gradient * x))
        offset = -torch.addcmul(rstd * average, mean, slope)
        slope, offset = _by_channel(x, slope, offset)
        return _affine(scale, gradient, _affine(slope, x, offset)), None, None, None, None


def _group_moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / √(variance + eps) of each group, `[N, G, 1]`, in `full` precision."""
    if torch.compiler.is_compiling() or x.dtype.itemsize >= 4:
        variance, mean = torch.var_mean(full(x), (2, 3), correction=0)
    else:  # torch.var_mean would round its results to x's dtype
        mean = x.mean((2, 3), dtype=torch.float32)
        square = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32).square() / x[0, 0].numel()
        variance = (square - mean.square()).clamp(min=0)
    within = variance.view(len(x), groups, -1).mean(-1, keepdim=True)
    between, mean = torch.var_mean(mean.view(len(x), groups, -1), -1, correction=0, keepdim=True)
    return mean, (within + between + eps).rsqrt()


def _group_mean(weight: Tensor, x: Tensor) -> Tensor:
    """⟨weight x⟩ `[N, G, 1]` for weights `[G, C / G]`."""
    channels = x.mean((2, 3), dtype=weight.dtype)
    return (weight * channels.view(len(x), *weight.shape)).mean(-1, keepdim=True)


def _by_channel(x: Tensor, *coefficients: Tensor) -> list[Tensor]:
    """`coefficients` `[N, G, C / G]` or `[N, G, 1]`, expanded to `[N, C, 1, 1]`."""
    size = x.shape[1] // coefficients[0].shape[1]
    return [tensor.expand(-1, -1, size).reshape(*x.shape[:2], 1, 1) for tensor in coefficients]


def _affine(factor: Tensor, x: Tensor, addend: Tensor) -> Tensor:
    """factor x + addend in the precision of the factor `[N, C, 1, 1]`, rounded once to x's dtype.

    Overwrites the addend if it has x's shape, except while compiling.
    """
    if torch.compiler.is_compiling():
        return torch.addcmul(addend, x, factor).to(x.dtype)
    return torch.addcmul(addend, x, factor, out=addend if addend.shape == x.shape else torch.empty_like(x))


def _silu(x: Tensor) -> Tensor:
    """In place, except while compiling: torch 2.11 would then treat the function as not differentiable."""
    return functional.silu(x, inplace=not torch.compiler.is_compiling())


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Overwrites x, except while compiling."""
    if torch.compiler.is_compiling():
        return torch.ops.aten.silu_backward(gradient, x)
    return torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=x)
