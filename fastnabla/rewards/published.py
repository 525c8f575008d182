"""Rewards whose weights are published: built from them, from copies, or with random weights."""

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
    """A `RewardModel` that knows where its weights are."""

    name: ClassVar[str]
    """As in ``--reward.terms``."""
    sources: ClassVar[dict[str, Source]]
    """Where its parts are published: ``""`` is the weights, others have names, like ``tokenizer``."""

    @classmethod
    @abc.abstractmethod
    def from_weights(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """The published reward; `options.weights` may name copies."""

    @classmethod
    @abc.abstractmethod
    def random_init(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """The real architecture with random weights, always the same; `device` may be meta."""

    @classmethod
    def build(cls, device: torch.device, options: RewardOptions = DEFAULTS) -> Self:
        """The reward as `options` want it.

        Raises:
            ValueError: weights are missing, damaged, another network's, or of an unknown part.
        """
        for part in options.weights:
            if part.partition(".")[0] == cls.name and part not in cls.parts():
                raise ValueError(f"reward.weights: unknown part {part!r}; there are {', '.join(cls.parts())}.")
        return (cls.random_init if options.random_init else cls.from_weights)(device, options)

    @classmethod
    def parts(cls) -> dict[str, Source]:
        """`sources` by the names that `RewardOptions.weights` uses: ``hpsv2``, ``hpsv2.tokenizer``."""
        return {f"{cls.name}.{part}" if part else cls.name: source for part, source in cls.sources.items()}

    @classmethod
    def find(cls, part: str, options: RewardOptions) -> list[Path]:
        """Local paths of the files of one of the `parts`; see `find_files`."""
        return find_files(part, cls.parts()[part], options.weights.get(part))


def made_on(device: torch.device, make: Callable[[], dict[str, nn.Module]]) -> dict[str, nn.Module]:
    """Networks made by `make` on `device`, with the weights of seed 0; torch's generators are left as they were."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.device(device):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        return make()
