"""A quick check of a reward before a run: does it work, and does it have a gradient?"""

from collections.abc import Sequence

import torch

from fastnabla.rewards.score import score
from fastnabla.rewards.sum import RewardSum


def check_reward(
    reward: RewardSum, prompts: Sequence[str], image_size: tuple[int, int], device: torch.device | str = "cpu"
) -> None:
    """Run every term on two random images, so that a broken reward stops a run before its first step.

    Args:
        reward: the sum to check.
        prompts: prompts of the run; the first and the last are used.
        image_size: (H, W) of the run's images.
        device: device of the images.

    Raises:
        ValueError: a term fails, returns the wrong shape or non-finite values, or has no finite gradient with respect to
            the images.
    """
    prompts = [prompts[0], prompts[-1]]
    generator = torch.Generator().manual_seed(0)
    for name, (function, _) in reward.terms.items():
        images = torch.rand(2, 3, *image_size, generator=generator).to(device).requires_grad_()
        values = score(name, function, images, prompts, reward.timeout)
        if not torch.isfinite(values).all():
            raise ValueError(f"reward {name!r} returned {values.tolist()} on random images; it must be finite.")
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is None or not torch.isfinite(gradient).all():
            raise ValueError(
                f"reward {name!r} has {'no' if gradient is None else 'a non-finite'} gradient with respect to the images."
            )
