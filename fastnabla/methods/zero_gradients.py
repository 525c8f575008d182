"""Checks for gradients that are zero although there is something to learn. They stop a run that would silently train nothing.

A fast path can lose a gradient without an error. For example, torch 2.11 reused a graph compiled for constant weights after
they became trainable. So a zero gradient is an error, unless the quantity that drives it is zero too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DRIVE = "drive"
"""Name of the signal that drives the gradient of the trained weights: a residual or an advantage."""
REWARD_GRADIENT = "reward gradient"
"""Name of the signal ∇r."""


class ZeroGradientError(RuntimeError):
    """A gradient is zero, or missing, where it must not be."""


def require_connected(gradients: Sequence[Tensor | None], names: Sequence[str], all_of_them: bool, path: str) -> None:
    """Check that a loss depends on the trained weights.

    Args:
        gradients: by weight; None if the loss does not depend on it.
        names: of the weights.
        all_of_them: whether every weight must have a gradient, or only one of them.
        path: how they were computed, in words.

    Raises:
        ZeroGradientError: the gradients are missing.
    """
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    if missing and (all_of_them or len(missing) == len(names)):
        raise ZeroGradientError(
            f"the loss does not depend on {len(missing)} of {len(names)} trained weights, such as {missing[0]} ({path}). "
            "They would not be trained. If --compute.compile is not none, use none. If this remains, the network never calls these layers: "
            "leave them out of lora.targets."
        )


def require_gradient(update: int, signals: dict[str, float], norm: float, path: str) -> None:
    """Check that an update has something to learn from, and a gradient to learn it with.

    Args:
        update: number of the update.
        signals: largest absolute value over the batch of `DRIVE` and, if the method has one, of `REWARD_GRADIENT`.
        norm: norm of the gradient of the policy's weights.
        path: how they were computed, in words.

    Raises:
        ZeroGradientError: ∇r is zero in the whole batch, or the gradient is zero although `DRIVE` is not.
    """
    if signals.get(REWARD_GRADIENT) == 0:
        raise ZeroGradientError(
            f"update {update}: the reward's gradient is zero in every row of the batch ({path}). Nothing would be learned. "
            "If --compute.compile is not none, use none. If this remains, the reward does not depend on the images: check it with "
            "`python -m fastnabla.rewards check`, and try without --model.tiny-decoder."
        )
    if norm == 0 and signals.get(DRIVE, 0) > 0:
        raise ZeroGradientError(
            f"update {update}: the gradient of the policy's weights is zero, although the loss is not ({path}). Nothing would "
            "be learned. Use --backend torch, and --compute.compile none if it is not; with --model.dtype float16, use bfloat16."
        )


def largest(values: Tensor) -> Tensor:
    """Largest absolute value, a scalar on the device; 0 for an empty tensor."""
    return values.abs().amax().float() if values.numel() else torch.zeros((), device=values.device)
