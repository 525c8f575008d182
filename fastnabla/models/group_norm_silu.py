"""Group normalisation followed by SiLU with frozen weights, forward and backward: by torch's kernels, or by Triton's.

The functions here are the specification in plain torch, for tensors in NCHW or channels-last. On CUDA, torch's group
normalisation computes in NCHW (torch 2.13, `group_norm.cpp`): channels-last tensors are copied to it, and results are in it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastnabla.objective.backend import kernels_compute
from fastnabla.objective.settings import Backend


class GroupNormSiLU(NamedTuple):
    """`group_norm_silu` and `group_norm_silu_backward`, by whatever computes them."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``silu(group_norm(x))`` in the dtype of `x`, and what the backward pass needs: mean and 1 / √(variance + eps)
    of each row's groups, `[N, groups]`.

    Args:
        x: `[N, C, H, W]`.
        weight, bias: `[C]`.
        groups: a divisor of C.
        eps: added to the variance.
    """
    normalised, mean, rstd = torch.native_group_norm(_native(x), weight, bias, *_sizes(x), groups, eps)
    return _silu(normalised), mean, rstd


def group_norm_silu_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None = None,
) -> Tensor:
    """The gradient in `x`, in its dtype. The normalisation is computed again.

    Overwrites `gradient`, except while compiling.

    Args:
        gradient: of `group_norm_silu(x, …)`, `[N, C, H, W]` in the layout of `x`.
        x, weight, bias, groups, eps: as for `group_norm_silu`.
        mean, rstd: what it returned.
        skip: added to the result, `[N, C, H, W]`: the gradient of a residual connection from x around the layer.
    """
    x = _native(x)
    normalised = torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)[0]
    gradient = _silu_backward(_native(gradient), normalised)
    del normalised
    moments = (x, mean, rstd, weight, *_sizes(x), groups)
    out = torch.ops.aten.native_group_norm_backward(gradient, *moments, (True, False, False))[0]
    return out if skip is None else out + skip


PLAIN = GroupNormSiLU(group_norm_silu, group_norm_silu_backward)


def select(backend: Backend, device: torch.device, dtype: torch.dtype) -> GroupNormSiLU:
    """What computes the normalisations of a channels-last network on `device`, with activations of `dtype`. The choice is
    logged once.

    Raises:
        ValueError: as `fastnabla.objective.backend.kernels_compute`.
    """
    if not kernels_compute("normalisations of the decoder", backend, device, dtype):
        return PLAIN
    from fastnabla.kernels import group_norm_silu as kernel

    return GroupNormSiLU(kernel.group_norm_silu, kernel.group_norm_silu_backward)


def _native(x: Tensor) -> Tensor:
    """`x` in a layout in which torch's kernels compute."""
    return x.contiguous() if x.is_cuda else x


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _silu(x: Tensor) -> Tensor:
    """In place, except while compiling: torch 2.11 would then treat the function as not differentiable."""
    return functional.silu(x, inplace=not torch.compiler.is_compiling())


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Overwrites the gradient, except while compiling."""
    if torch.compiler.is_compiling():
        return torch.ops.aten.silu_backward(gradient, x)
    return torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=gradient)
