"""What an update learns from: trajectories that a rollout has stored, or that the training step itself will sample."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastnabla.config.sections import PromptDraw
from fastnabla.prompts import assign_prompts
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.utils.seeding import seed_of


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

    rollouts: list[dict[str, float]]
    """Metrics of the rollouts that are stored to be learned from, oldest first: this round's, and those ahead of it."""

    def collect(self, round_: int) -> dict[str, float]:
        """Do what a round begins with; metrics of what it learns from."""

    def select(self, round_: int, numbers: Tensor, again: bool = False) -> Any:
        """What a training step is called with.

        Args:
            round_: the round.
            numbers: of its trajectories, `[n]` from 0; of those that are this rank's.
            again: whether an earlier inner epoch has gone over them.
        """

    def finish(self) -> None:
        """Do what a round ends with."""


@dataclasses.dataclass(slots=True)
class StoredTrajectories:
    """Rollouts, of which a round learns from the one `replay` rounds before its own.

    Rollouts are numbered by the round that learns from them. Those that the first rounds need, 0 to `replay`, are all
    sampled before round 0; then each round samples one ahead, until the last round has its own.
    """

    rollout: Callable[[int], dict[str, float]]
    """Samples rollout number n into the buffer; its metrics."""
    buffer: TrajectoryBuffer
    """With room for `replay` + 1 rollouts."""
    slots: Tensor
    """Numbers of the trajectories of a rollout that are in the buffer, in its order: rising, on the host."""
    rounds: int
    """Of the run."""
    replay: int = 0
    rollouts: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def collect(self, round_: int) -> dict[str, float]:
        """As `Source`. A rollout that is interrupted leaves nothing in the buffer."""
        if not self.rollouts:
            self.buffer.clear()
        last = min(round_ + self.replay, self.rounds - 1)
        for number in range(round_ + len(self.rollouts), last + 1):
            before = len(self.buffer)
            try:
                self.rollouts.append(self.rollout(number))
            except BaseException:
                self.buffer.forget(len(self.buffer) - before, newest=True)
                raise
        return self.rollouts[0]

    def select(self, round_: int, numbers: Tensor, again: bool = False) -> Any:
        """As `Source`: the drawn transitions, to be gathered when they are needed."""
        places = torch.searchsorted(self.slots, numbers)
        selection = self.buffer.select(self.buffer.slots()[places])  # the round's are the oldest
        return dataclasses.replace(selection, again=again)

    def finish(self) -> None:
        """As `Source`: the rollout has been used up."""
        self.buffer.forget(len(self.slots))
        del self.rollouts[0]


@dataclasses.dataclass(slots=True)
class NewTrajectories:
    """The same trajectories, by prompt and noise, that a rollout would sample, not sampled yet."""

    seed: int
    count: int
    """In a round."""
    prompts: int
    """Prompts trained on."""
    draw: PromptDraw = "cycles"
    rollouts: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def collect(self, round_: int) -> dict[str, float]:
        """As `Source`: nothing."""
        return {}

    def select(self, round_: int, numbers: Tensor, again: bool = False) -> Trajectories:
        """As `Source`."""
        first = round_ * self.count
        seeds = [first + number for number in numbers.tolist()]
        return Trajectories(
            prompt=assign_prompts(self.seed, first, self.count, self.prompts, self.draw)[numbers],
            noise=[seed_of(self.seed, "noise", number) for number in seeds],
            draws=[seed_of(self.seed, "draws", number) for number in seeds],
        )

    def finish(self) -> None:
        """As `Source`: nothing."""
