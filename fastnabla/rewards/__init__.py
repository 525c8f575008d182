"""Rewards: differentiable functions of images and prompts, chosen by name or imported from a path.

A reward takes images `[B, 3, H, W]` in [0, 1] (float32, with a gradient) and B prompts, and returns `[B]` values.
Each term of the sum is written ``name=weight``, for example ``area=8``. The name is a key of `REWARDS`, or
``module:function`` for your own reward. If that is a `torch.nn.Module`, it is moved to the device.
"""

import importlib
import math
from collections.abc import Callable, Sequence

import torch

from fastnabla.config.model_sections import RewardConfig
from fastnabla.rewards import testbed
from fastnabla.rewards.check import check_reward
from fastnabla.rewards.options import DEFAULTS, RewardOptions, parse_weights
from fastnabla.rewards.score import RewardFunction
from fastnabla.rewards.sum import RewardSum
from fastnabla.utils.user_code import import_function, is_path

__all__ = [
    "PUBLISHED",
    "REWARDS",
    "RewardFunction",
    "RewardOptions",
    "RewardSum",
    "build_reward",
    "check_reward",
    "parse_term",
    "parse_weights",
    "published_class",
    "reward_of",
]

PUBLISHED: dict[str, str] = {
    "aesthetic": "Aesthetic",
    "clipscore": "ClipScore",
    "hpsv2": "HPSv2",
    "imagereward": "ImageReward",
    "pickscore": "PickScore",
}
"""Name → class of each reward with published weights. Its module has the same name."""


def published_class(name: str) -> type:
    """Import the `fastnabla.rewards.published.PublishedReward` called `name`. This imports transformers."""
    return getattr(importlib.import_module(f"fastnabla.rewards.{name}"), PUBLISHED[name])


REWARDS: dict[str, Callable[[torch.device, RewardOptions], RewardFunction]] = {
    "area": lambda device, options: testbed.area(device),
    "classifier": lambda device, options: testbed.classifier(device),
    "hue": lambda device, options: testbed.hue(device),
    **{name: lambda device, options, name=name: published_class(name).build(device, options) for name in PUBLISHED},
}
"""Name → builder: device and options → reward."""


def parse_term(term: str) -> tuple[str, float]:
    """Split a term written ``name`` (weight 1) or ``name=weight`` into name and weight.

    Raises:
        ValueError: the weight is 0, or not a finite number.
    """
    name, _, text = term.partition("=")
    try:
        weight = float(text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(
            f"reward.terms: {term!r:.200} has weight {text!r:.200}; write name=weight with a finite, nonzero weight."
        )
    return name, weight


def build_reward(
    terms: Sequence[str],
    device: torch.device | str = "cpu",
    options: RewardOptions = DEFAULTS,
    normalise: bool = False,
    clip: float | None = None,
    timeout: float | None = None,
) -> RewardSum:
    """Build the weighted sum of `terms` on `device`.

    Args:
        terms: each ``name=weight``.
        device: device of the images.
        options: settings of the network rewards.
        normalise: see `RewardSum`.
        clip: see `RewardSum`.
        timeout: see `RewardSum`.

    Raises:
        ValueError: there are no terms; a name is unknown, or a path cannot be imported; a weight is invalid;
            `options.weights` names a reward that is not among the terms; or weights cannot be loaded.
    """
    if not terms:
        raise ValueError(f"reward.terms is empty; name at least one of {', '.join(REWARDS)} or a module:function.")
    weights: dict[str, float] = {}
    for term in terms:
        name, weight = parse_term(term)
        if name in weights:
            raise ValueError(f"reward.terms: {name!r:.200} appears twice; give it once, with the sum of the weights.")
        weights[name] = weight
    for part in options.weights:
        if part.partition(".")[0] not in weights.keys() & PUBLISHED.keys():
            raise ValueError(
                f"reward.weights: {part!r:.200} belongs to no term with published weights. Rewards that have them: "
                f"{', '.join(PUBLISHED)}."
            )
    built = {name: (_find(name, torch.device(device), options), weight) for name, weight in weights.items()}
    return RewardSum(built, normalise, clip, timeout)


def _find(name: str, device: torch.device, options: RewardOptions) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name](device, options)
    if not is_path(name):
        raise ValueError(
            f"reward.terms: unknown reward {name!r:.200}. Known: {', '.join(REWARDS)}; for your own, write "
            "path.to.module:function."
        )
    reward = import_function(name, "reward.terms", "take images and prompts and return rewards")
    return reward.to(device) if isinstance(reward, torch.nn.Module) else reward


def reward_of(config: RewardConfig, random_init: bool, device: torch.device) -> RewardSum:
    """The reward that `config` describes, on `device`. With `random_init`, its networks have random weights.

    Raises:
        ValueError: see `build_reward`.
    """
    options = RewardOptions(
        weights=parse_weights(config.weights),
        preprocess=config.preprocess,
        checkpoint=config.checkpoint,
        precision=config.precision,
        random_init=random_init,
    )
    return build_reward(config.terms, device, options, config.normalise, config.clip, config.timeout)
