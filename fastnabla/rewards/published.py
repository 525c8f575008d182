"""Rewards with published weights, which load from the hub, from local copies, or start from random weights."""

import abc
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import nn

from fastnabla.rewards.model import RewardModel
from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.weights import Source, find_files


class PublishedReward(RewardModel):
    """A `RewardModel` whose weights are published."""

    name: ClassVar[str]
    """Name in ``--reward.terms``."""
    sources: ClassVar[dict[str, Source]]
    """Part → where it is published: ``""`` is the weights; others have names, such as ``tokenizer``."""

    @classmethod
    @abc.abstractmethod
    def from_weights(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """Load the published weights, or the copies that `options.weights` names."""

    @classmethod
    @abc.abstractmethod
    def random_init(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """Build the published architecture with random weights of a fixed seed. `device` may be meta."""

    @classmethod
    def build(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """Build the reward with published or random weights, according to `options`.

        Raises:
            ValueError: weights are missing or damaged, or do not fit the network; or `options.weights` names an unknown
                part.
        """
        for part in options.weights:
            if part.partition(".")[0] == cls.name and part not in cls.parts():
                raise ValueError(f"reward.weights: unknown part {part!r}; the parts are {', '.join(cls.parts())}.")
        return (cls.random_init if options.random_init else cls.from_weights)(device, options)

    @classmethod
    def parts(cls) -> dict[str, Source]:
        """`sources` by the names used in `RewardOptions.weights`: ``hpsv2``, ``hpsv2.tokenizer``."""
        return {f"{cls.name}.{part}" if part else cls.name: source for part, source in cls.sources.items()}

    @classmethod
    def find(cls, part: str, options: RewardOptions) -> list[Path]:
        """Local paths of the files of one of the `parts`. See `find_files`."""
        return find_files(part, cls.parts()[part], options.weights.get(part))


def made_on(device: torch.device, make: Callable[[], dict[str, nn.Module]]) -> dict[str, nn.Module]:
    """Call `make` to build networks on `device` with seed 0. The state of torch's generators is restored."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.device(device):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        return make()
