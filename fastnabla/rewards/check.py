"""The check of a reward before a run: quick, and only of what would break it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnabla.rewards.sum import RewardSum


def check_reward(
    reward: RewardSum, prompts: Sequence[str], image_size: tuple[int, int], device: torch.device | str = "cpu"
) -> None:
    """Try every term on two random images, so that a broken reward stops a run before its first step.

    Args:
        reward: the sum to check.
        prompts: prompts of the run; the first and last are tried.
        image_size: (H, W) of the images it will get.
        device: where they will be.

    Raises:
        ValueError: a term returns the wrong shape or non-finite values, or has no finite gradient in the images.
    """
    prompts = [prompts[0], prompts[-1]]
    generator = torch.Generator().manual_seed(0)
    for name, (function, _) in reward.terms.items():
        images = torch.rand(2, 3, *image_size, generator=generator).to(device).requires_grad_()
        values = function(images, prompts)
        if not isinstance(values, Tensor) or tuple(values.shape) != (2,):
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"reward {name!r} returned {found} for 2 images; it must return a tensor of shape (2,).")
        if not torch.isfinite(values).all():
            raise ValueError(f"reward {name!r} returned {values.tolist()} on random images; it must be finite.")
        if not values.requires_grad:
            raise ValueError(
                f"reward {name!r} has no gradient in the images; ∇-DB needs one. Look for torch.no_grad, .detach(), "
                "numpy or PIL inside it."
            )
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is None or not torch.isfinite(gradient).all():
            raise ValueError(
                f"reward {name!r} has {'no' if gradient is None else 'a non-finite'} gradient in the images."
            )
