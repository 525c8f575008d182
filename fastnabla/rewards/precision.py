"""The precision that a reward computes in, independent of the process's settings.

Torch has two kinds of switches: autocast is local to a thread, TF32 is global. A backward pass runs after the reward has
returned, with whatever switches are set then. So the forward and the backward pass are wrapped as one node of the graph, which
sets the switches and restores them.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastnabla.config.model_sections import Precision
from fastnabla.rewards.one_node import as_one_node

logger = logging.getLogger(__name__)


def precision_on(device: torch.device, precision: Precision | None) -> Precision:
    """The precision to use on `device`. None is TF32 on a GPU and float32 elsewhere. Without a GPU, TF32 falls back to
    float32, with one warning."""
    if device.type == "cuda":
        return precision or "tf32"
    if precision == "tf32":
        _log_no_tf32(device.type)
    return "bf16" if precision == "bf16" else "float32"


@functools.cache
def _log_no_tf32(device_type: str) -> None:
    logger.warning("reward.precision = 'tf32': %s has no TF32; the rewards compute in float32.", device_type)


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute matrix products and convolutions of float32 tensors in `precision` inside the context.

    "float32": full precision, no autocast. "tf32": inputs are rounded to 10 mantissa bits and products are summed in
    float32. "bf16": autocast to bfloat16; operations that autocast leaves in float32 have full precision.

    All of torch's TF32 switches are set: the newer ones per backend, and the older ones. They must agree, because
    torch.compile reads the older ones and torch raises if they differ. All are restored afterwards. They are global: other
    threads that multiply in the meantime are affected.
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
        for switch, value in newer:  # last, because setting the older switches changes them too
            switch.fp32_precision = value


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """Enable or disable autocast to bfloat16. Does nothing on devices without autocast, such as meta."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _switches() -> tuple[Any, ...]:
    """All objects with an `fp32_precision`: the global one, cuDNN, and each backend's kinds of operations. "none" inherits
    from the wider switch, so the wider ones come first. (For oneDNN as a whole, torch 2.11 and 2.13 set the global one.)"""
    backends = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


def _cudnn() -> bool:
    """cuDNN's older switch, read while the newer ones are "none": torch then returns False if it is off, and raises if it
    is on."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return True


def _set_cudnn(tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = tf32


def score_in(precision: Precision, score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`score(images)` `[B]`, with both forward and backward pass computed in `precision`.

    Args:
        precision: see `computing_in`.
        score: see `fastnabla.rewards.one_node.as_one_node`.
        images: `[B, 3, H, W]`.

    Raises:
        RuntimeError: see `as_one_node`.
    """
    # The backward pass follows the forward pass's dtypes, so it needs no autocast.
    backward = "float32" if precision == "bf16" else precision
    forward, backward = (functools.partial(computing_in, each, images.device) for each in (precision, backward))
    return as_one_node(score, images, forward, backward)
