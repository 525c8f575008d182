"""Gradients that are zero although something is to be learned: the run stops, since it would train nothing in silence.

A fast path can lose a gradient without an error. torch 2.11, for example, used a graph that was compiled for constant
weights again when they were trained. So a zero is an error unless the quantity that drives it is zero too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DRIVE = "drive"
"""Name of the signal that the trained weights' gradient is proportional to: a residual, or an advantage."""
REWARD_GRADIENT = "reward gradient"
"""Name of the signal ∇r."""


class ZeroGradientError(RuntimeError):
    """A gradient is zero, or missing, where it must not be."""


def require_connected(gradients: Sequence[Tensor | None], names: Sequence[str], all_of_them: bool, path: str) -> None:
    """Make sure that a loss depends on the trained weights.

    Args:
        gradients: by weight; None where the loss does not depend on it.
        names: of the weights.
        all_of_them: each weight must have a gradient, rather than any.
        path: how they were computed, in words.

    Raises:
        ZeroGradientError: the gradients are missing.
    """
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    if missing and (all_of_them or len(missing) == len(names)):
        raise ZeroGradientError(
            f"the loss does not depend on {len(missing)} of {len(names)} trained weights, such as {missing[0]} ({path}). "
            "They would not be trained. Use --compute.compile none. If this remains, the network never calls these layers: "
            "leave them out of lora.targets."
        )


def require_gradient(update: int, signals: dict[str, float], norm: float, path: str) -> None:
    """Make sure that update number `update` has something to learn from, and learns it.

    Args:
        update: its number.
        signals: largest absolute value over the batch of `DRIVE` and, where the method has one, of `REWARD_GRADIENT`.
        norm: of the gradient in the policy's weights.
        path: how they were computed, in words.

    Raises:
        ZeroGradientError: ∇r is zero in the whole batch, or the gradient is, although `DRIVE` is not.
    """
    if signals.get(REWARD_GRADIENT) == 0:
        raise ZeroGradientError(
            f"update {update}: the reward's gradient is zero in every row of the batch ({path}). Nothing would be learned. "
            "Use --compute.compile none. If this remains, the reward does not depend on the images: check it with "
            "`python -m fastnabla.rewards check`, and try without --model.tiny-decoder."
        )
    if norm == 0 and signals.get(DRIVE, 0) > 0:
        raise ZeroGradientError(
            f"update {update}: the gradient of the policy's weights is zero, although the loss is not ({path}). Nothing would "
            "be learned. Use --compute.compile none, and --backend torch; with --model.dtype float16, use bfloat16."
        )


def largest(values: Tensor) -> Tensor:
    """Largest absolute value, a scalar on the device; 0 of none."""
    return values.abs().amax().float() if values.numel() else torch.zeros((), device=values.device)
