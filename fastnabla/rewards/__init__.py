"""Rewards: differentiable functions of images and prompts, chosen by name or plugged in by path.

A reward takes images `[B, 3, H, W]` in [0, 1] (float32, with a gradient) and B prompts, and returns `[B]` values.
A term of a sum is written ``name=weight`` (``area=8``); the name is one of the `REWARDS`, or ``module:function``
for a reward of your own, which needs no change here.
"""

import importlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnabla.rewards import testbed

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]

REWARDS: dict[str, Callable[[torch.device], RewardFunction]] = {
    "area": testbed.area,
    "classifier": testbed.classifier,
    "hue": testbed.hue,
}
"""Builders of the named rewards: device → reward."""


class RewardSum:
    """A weighted sum of rewards.

    Args:
        terms: reward and weight by name.
    """

    def __init__(self, terms: dict[str, tuple[RewardFunction, float]]) -> None:
        self.terms = terms

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every term's unweighted values `[B]`."""
        return {name: reward(images, prompts) for name, (reward, _) in self.terms.items()}

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum `[B]` of `parts`."""
        return torch.stack([weight * parts[name].float() for name, (_, weight) in self.terms.items()]).sum(0)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.total(self.parts(images, prompts))


def parse_term(term: str) -> tuple[str, float]:
    """Name and weight of a term written ``name`` (weight 1) or ``name=weight``.

    Raises:
        ValueError: the weight is not a finite number other than 0.
    """
    name, _, text = term.partition("=")
    try:
        weight = float(text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"reward.terms: {term!r} has weight {text!r}; write name=weight with a finite weight, not 0.")
    return name, weight


def build_reward(terms: Sequence[str], device: torch.device | str = "cpu") -> RewardSum:
    """The weighted sum of `terms`, on `device`.

    Raises:
        ValueError: no terms, an unknown name, a path that cannot be imported, or a bad weight.
    """
    if not terms:
        raise ValueError(f"reward.terms is empty; name at least one of {', '.join(REWARDS)} or a module:function.")
    built = {}
    for term in terms:
        name, weight = parse_term(term)
        if name in built:
            raise ValueError(f"reward.terms: {name!r} appears twice; give it once, with the summed weight.")
        built[name] = (_find(name, torch.device(device)), weight)
    return RewardSum(built)


def _find(name: str, device: torch.device) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name](device)
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"reward.terms: unknown reward {name!r}. Known: {', '.join(REWARDS)}; your own: path.to.module:function."
        )
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward.terms: cannot import {name!r} ({error}). Run from the folder the module lies in, or install it."
        ) from error
    if not callable(reward):
        raise ValueError(f"reward.terms: {name!r} is not callable; it must map images and prompts to rewards.")
    return reward


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
