"""Which samples of a rollout are finite."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger("fastnabla")

NAMED = 3
"""Maximum number of samples named in a message."""


def finite_samples(latents: Tensor, parts: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """Which samples and their rewards are all finite. A warning names the others. Waits for the device.

    Args:
        latents: `[N, C, H, W]`.
        parts: rewards `[N]` by name.
        prompts: the N prompts.

    Returns:
        `[N]` bool, on the CPU.

    Raises:
        FloatingPointError: no sample is finite.
    """
    checks = {"the latents": latents.isfinite().flatten(1).all(1)}
    checks |= {f"reward {name!r}": values.isfinite() for name, values in parts.items()}
    finite = torch.stack(list(checks.values())).cpu()
    every = finite.all(0)
    bad = [
        f"{', '.join(name for name, is_finite in zip(checks, finite[:, i], strict=True) if not is_finite)} for {prompts[i]!r}"
        for i in (~every).nonzero().flatten().tolist()
    ]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        message = f"not finite in {len(bad)} of {len(every)} samples: {'; '.join(bad[:NAMED])}{more}"
        if not every.any():
            raise FloatingPointError(
                f"{message}. Nothing can be learned from such a rollout; lower optimizer.learning_rate."
            )
        logger.warning("%s; they are left out of the rollout's statistics", message)
    return every
