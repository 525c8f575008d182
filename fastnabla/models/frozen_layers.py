"""Layers with frozen weights that are differentiated only with respect to their input. They keep fewer activations than
torch's layers.

Results and gradients have the input's layout, NCHW or channels-last. torch's own convolution does not preserve it:
`conv2d_input` passes cuDNN a placeholder of neither layout, so a channels-last gradient is copied to NCHW and back.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastnabla.models.group_norm_silu import PLAIN, GroupNormSiLU, memory_format


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """`layer(x)` for a stride of 1, without keeping x for the backward pass."""
    return _Convolution.apply(x, layer.weight, layer.bias, layer.padding)


def norm_silu(layer: nn.GroupNorm, x: Tensor, by: GroupNormSiLU = PLAIN) -> tuple[Tensor, Tensor]:
    """`silu(layer(x))`, and x again for a residual connection, whose gradient is then added in this layer's backward pass.

    Keeps x and the moments of its groups. The backward pass recomputes the normalisation, and overwrites the gradient of the
    result. So the result must go to `convolve` and nowhere else.
    """
    return _NormSiLU.apply(x, layer.weight, layer.bias, layer.num_groups, layer.eps, by)


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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, by: GroupNormSiLU
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = by.forward(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.norm, ctx.by = (weight, bias, groups, eps), by
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, skip: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        layout = memory_format(x)
        gradient = gradient.contiguous(memory_format=layout)
        skip = None if skip is None else skip.contiguous(memory_format=layout)
        return ctx.by.backward(gradient, x, mean, rstd, *ctx.norm, skip), *(None,) * 5
