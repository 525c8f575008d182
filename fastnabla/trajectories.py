"""What an update learns from: trajectories that a rollout has stored, or that the training step itself will sample."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastnabla.buffer import TrajectoryBuffer
from fastnabla.prompts import assign_prompts
from fastnabla.seeding import seed_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """N trajectories to be sampled, as their prompts and randomness."""

    prompt: Tensor
    """Prompt numbers `[N]` int64, on the host."""
    noise: Sequence[int]
    """Seeds of x_0 and all noise."""
    draws: Sequence[int]
    """Seeds of what a method draws besides."""

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows: Tensor) -> "Trajectories":
        chosen = rows.tolist()
        return Trajectories(
            prompt=self.prompt[rows], noise=[self.noise[i] for i in chosen], draws=[self.draws[i] for i in chosen]
        )


class Source(Protocol):
    """Where the trajectories of a round of updates come from."""

    def collect(self, round_: int) -> dict[str, float]:
        """Do what a round begins with; its metrics."""

    def select(self, round_: int, slots: Tensor) -> Any:
        """What a training step is called with, for the trajectories numbered `slots [n]` of the round, from 0; of those
        that are this rank's."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTrajectories:
    """A rollout's."""

    rollout: Callable[[int], dict[str, float]]
    """Samples the trajectories of a round into the buffer; its metrics."""
    buffer: TrajectoryBuffer
    slots: Tensor
    """Numbers of the trajectories that are in the buffer, in its order: rising, on the host."""

    def collect(self, round_: int) -> dict[str, float]:
        """As `Source`."""
        return self.rollout(round_)

    def select(self, round_: int, slots: Tensor) -> Any:
        """As `Source`: the drawn transitions, to be gathered when they are needed."""
        return self.buffer.select(torch.searchsorted(self.slots, slots))


@dataclasses.dataclass(frozen=True, slots=True)
class NewTrajectories:
    """The same trajectories, by prompt and noise, that a rollout would sample, not sampled yet."""

    seed: int
    count: int
    """In a round."""
    prompts: int
    """Prompts trained on."""

    def collect(self, round_: int) -> dict[str, float]:
        """As `Source`: nothing."""
        return {}

    def select(self, round_: int, slots: Tensor) -> Trajectories:
        """As `Source`."""
        first = round_ * self.count
        numbers = [first + slot for slot in slots.tolist()]
        return Trajectories(
            prompt=assign_prompts(self.seed, first, self.count, self.prompts)[slots],
            noise=[seed_of(self.seed, "noise", number) for number in numbers],
            draws=[seed_of(self.seed, "draws", number) for number in numbers],
        )
