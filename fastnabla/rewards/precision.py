"""The precision that a reward computes in, whatever the process around it has switched on.

Torch has two kinds of switches for it: autocast, which belongs to the thread, and TF32, which is global. A backward pass
runs after the reward has returned, with the switches as they are then. So forward and backward pass are wrapped together,
as one node of the graph, which sets the switches and puts them back.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnabla.config.sections import Precision

logger = logging.getLogger(__name__)


def precision_on(device: torch.device, precision: Precision | None) -> Precision:
    """What `precision` is on `device`: None is TF32 on a GPU and float32 elsewhere. TF32 needs a GPU: elsewhere it is
    float32, which the log says once."""
    if device.type == "cuda":
        return precision or "tf32"
    if precision == "tf32":
        _log_no_tf32(device.type)
    return "bf16" if precision == "bf16" else "float32"


@functools.cache
def _log_no_tf32(device_type: str) -> None:
    logger.warning("reward.precision = 'tf32': no TF32 on %s; the rewards compute in float32.", device_type)


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within, matrix products and convolutions of float32 tensors are in `precision`.

    "float32": full products, no autocast. "tf32": products of inputs rounded to 10 bits of mantissa, summed in float32.
    "bf16": autocast to bfloat16, and full products of what autocast leaves in float32.

    All of torch's TF32 switches are set: those by backend, and the older ones, which must say the same, since torch
    refuses to read an older one that differs, and torch.compile reads them. All are as before afterwards. They are
    global: another thread that multiplies meanwhile is affected.
    """
    newer: list[tuple[Any, str]] = []
    older: list[tuple[Callable[[Any], None], Any]] = []
    try:
        for switch in _switches():
            newer.append((switch, switch.fp32_precision))
            switch.fp32_precision = "none"
        older += [(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())]
        older += [(_set_cudnn, _cudnn())]
        tf32 = precision == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        _set_cudnn(tf32)
        for switch, _ in newer:
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        with autocast(device, precision == "bf16"):
            yield
    finally:
        for put_back, value in older:
            put_back(value)
        for switch, value in newer:  # last: the older switches set them too
            switch.fp32_precision = value


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, or none; nothing on devices that have none, such as meta."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _switches() -> tuple[Any, ...]:
    """What has an `fp32_precision`: everything, CUDA, and the backends' kinds of operations. One that is "none" reads as the
    wider one, so the wider ones come first. (Of oneDNN as a whole, torch 2.11 and 2.13 set the one of everything.)"""
    backends = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


def _cudnn() -> bool:
    """cuDNN's older switch, while the newer ones are "none": torch reads it if it is off too, and else raises."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return True


def _set_cudnn(tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = tf32


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, score: Callable[[Tensor], Tensor], precision: Precision) -> Tensor:
        leaf = images.detach().requires_grad_()
        with torch.enable_grad(), computing_in(precision, images.device):
            values = score(leaf)
        # The backward pass has the forward pass's dtypes; autocast is not for it.
        ctx.graph, ctx.precision = (leaf, values), "float32" if precision == "bf16" else precision
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
        with computing_in(ctx.precision, leaf.device):
            (image_gradient,) = torch.autograd.grad(values, leaf, gradient)
        return image_gradient, None, None


def score_in(precision: Precision, score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`score(images)` `[B]`, computed in `precision` in its forward and its backward pass.

    Args:
        precision: see `computing_in`.
        score: differentiable function of the images alone; what else it depends on is a constant.
        images: `[B, 3, H, W]`.

    Raises:
        RuntimeError: from a second backward pass through the result, or a derivative of its gradient.
    """
    if torch.is_grad_enabled() and images.requires_grad:
        return _Scored.apply(images, score, precision)
    with computing_in(precision, images.device):
        return score(images)
