"""Layers with frozen weights that are differentiated only with respect to their input. They keep fewer activations than
torch's layers.

Results and gradients have the input's layout, NCHW or channels-last. torch's own convolution does not preserve it:
`conv2d_input` passes cuDNN a placeholder of neither layout, so a channels-last gradient is copied to NCHW and back.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastnabla.models.group_norm_silu import PLAIN, GroupNormSiLU


def memory_format(x: Tensor) -> torch.memory_format:
    """`torch.channels_last` if `x` is channels-last and not also contiguous, else `torch.contiguous_format`."""
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """`layer(x)` for a stride of 1, without keeping x for the backward pass."""
    return _Convolution.apply(x, layer.weight, layer.bias, layer.padding)


def norm_silu(layer: nn.GroupNorm, x: Tensor, by: GroupNormSiLU = PLAIN) -> Tensor:
    """`silu(layer(x))`. Keeps x and the moments of its groups.

    The backward pass recomputes the normalisation, and overwrites the gradient of the result. So the result must go to
    `convolve` and nowhere else.
    """
    return _NormSiLU.apply(x, layer.weight, layer.bias, layer.num_groups, layer.eps, by, False)


def norm_silu_and_input(layer: nn.GroupNorm, x: Tensor, by: GroupNormSiLU = PLAIN) -> tuple[Tensor, Tensor]:
    """`norm_silu(layer, x)`, and x for a shortcut around the layer, whose gradient is added in the layer's backward pass."""
    return _NormSiLU.apply(x, layer.weight, layer.bias, layer.num_groups, layer.eps, by, True)


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
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, by: GroupNormSiLU, and_input: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        layout = memory_format(x)
        x = x.contiguous(memory_format=layout)
        y, mean, rstd = by.forward(x, weight, bias, groups, eps)
        # Where nothing is copied, torch 2.11 would compile a function without a gradient.
        if not y.is_contiguous(memory_format=layout):
            y = y.contiguous(memory_format=layout)
        ctx.save_for_backward(x, mean, rstd)
        ctx.norm, ctx.by, ctx.memory_format = (weight, bias, groups, eps), by, layout
        return (y, x) if and_input else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, skip: Tensor | None = None) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=ctx.memory_format)
        skip = None if skip is None else skip.contiguous(memory_format=ctx.memory_format)
        out = ctx.by.backward(gradient, *ctx.saved_tensors, *ctx.norm, skip)
        return out.contiguous(memory_format=ctx.memory_format), *(None,) * 6
