"""float32 arithmetic for a reward, whatever the process around it has switched on.

Two switches of torch lower the precision of float32 arithmetic: autocast, which belongs to the thread, and TF32 (on CPUs
also bfloat16), which is global. A backward pass runs after the reward has returned, with the switches as they are then.
So forward and backward pass are wrapped together, as one node of the graph, which sets both switches and puts them back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _switches() -> tuple[Any, ...]:
    """What holds `fp32_precision`: each backend's matrix product and convolution."""
    backends = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv


@contextmanager
def float32(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """No autocast, and full float32 products, or TF32 ones where the device has them.

    The switches are global: another thread that multiplies meanwhile is affected. They are set by backend; torch's
    older, common ones (`torch.get_float32_matmul_precision`) cannot be read inside, and are as before afterwards.
    """
    before = [switch.fp32_precision for switch in _switches()]
    try:
        for switch in _switches():
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(_switches(), before, strict=True):
            switch.fp32_precision = precision


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, score: Callable[[Tensor], Tensor], tf32: bool) -> Tensor:
        leaf = images.detach().requires_grad_()
        with torch.enable_grad(), float32(images.device, tf32):
            values = score(leaf)
        ctx.graph, ctx.tf32 = (leaf, values), tf32
        result = values.detach()
        if not values.requires_grad:
            ctx.mark_non_differentiable(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.graph is None:
            raise RuntimeError("a reward's gradient can be taken once per call; retain_graph does not reach into it.")
        (leaf, values), ctx.graph = ctx.graph, None
        with float32(leaf.device, ctx.tf32):
            (image_gradient,) = torch.autograd.grad(values, leaf, gradient)
        return image_gradient, None, None


def score_in_float32(score: Callable[[Tensor], Tensor], images: Tensor, tf32: bool = False) -> Tensor:
    """`score(images)` `[B]` with `float32` around its forward and its backward pass.

    Args:
        score: differentiable function of the images alone; what else it depends on is a constant.
        images: `[B, 3, H, W]`.
        tf32: allow TF32.

    Raises:
        RuntimeError: from a second backward pass through the result, or a derivative of its gradient.
    """
    if torch.is_grad_enabled() and images.requires_grad:
        return _Scored.apply(images, score, tf32)
    with float32(images.device, tf32):
        return score(images)
