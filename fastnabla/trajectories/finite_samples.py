"""Which samples of a rollout are finite."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger("fastnabla")

TOLD = 3
"""Most samples named in one message."""


def finite_samples(latents: Tensor, parts: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """Which samples of a rollout are finite, and have finite rewards; a warning names others. Waits for the device.

    Args:
        latents: `[N, C, H, W]`.
        parts: rewards `[N]` by name.
        prompts: the N prompts.

    Returns:
        `[N]` bool, on the host.

    Raises:
        FloatingPointError: none is.
    """
    named = {"the latents": latents.isfinite().flatten(1).all(1)}
    named |= {f"reward {name!r}": values.isfinite() for name, values in parts.items()}
    finite = torch.stack(list(named.values())).cpu()
    every = finite.all(0)
    told = [
        f"{', '.join(name for name, is_finite in zip(named, finite[:, i], strict=True) if not is_finite)} for {prompts[i]!r}"
        for i in (~every).nonzero().flatten().tolist()
    ]
    if told:
        more = f" and {len(told) - TOLD} more" if len(told) > TOLD else ""
        message = f"not finite in {len(told)} of {len(every)} samples: {'; '.join(told[:TOLD])}{more}"
        if not every.any():
            raise FloatingPointError(
                f"{message}. Nothing can be learned from such a rollout; lower optimizer.learning_rate."
            )
        logger.warning("%s; they are left out of the rollout's statistics", message)
    return every
