"""What each update learns from: trajectories that a rollout has stored, or that the training step will sample itself."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastnabla.config.model_sections import PromptDraw
from fastnabla.config.training_sections import RolloutConfig
from fastnabla.prompts import assign_prompts
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.draws import draw_reverse
from fastnabla.utils.seeding import generator_of, seed_of


def learning_order(seed: int, rollout_index: int, rollout: RolloutConfig) -> list[Tensor]:
    """Which of a rollout's trajectories each of its `updates · epochs` updates learns from.

    The first inner epoch takes the trajectories in order. Each later one shuffles the trajectories that have the same place in
    their updates, place by place, so that each rank has as many of every update as in the first.

    Args:
        seed: of the run.
        rollout_index: number of the rollout.
        rollout: settings.

    Returns:
        Numbers of trajectories by update, `[trajectories / updates]` int64 each.
    """
    numbers = torch.arange(rollout.trajectories).view(rollout.updates, -1)
    orders = [numbers]
    for epoch in range(1, rollout.epochs):
        generator = generator_of(seed, "order", rollout_index, epoch)
        order = torch.rand(numbers.shape, generator=generator, dtype=torch.float64).argsort(0)
        orders.append(numbers.gather(0, order))
    return [update for order in orders for update in order]


def reverse_factors(
    seed: int, rollout: RolloutConfig, drawn_steps: int, fraction: float
) -> Callable[[int], Tensor] | None:
    """`StoredTrajectories.reverse_factors` for a `fraction` of the inner transitions. With `rollout.draw = "runs"`, whole runs
    are drawn.

    Args:
        seed: of the run.
        rollout: settings.
        drawn_steps: K − 1.
        fraction: `objective.reverse_fraction`.
    """
    if fraction == 1:
        return None
    count, whole = rollout.trajectories, rollout.draw == "runs"

    def factors(rollout_index: int) -> Tensor:
        first = rollout_index * count
        inner = draw_reverse(seed_of(seed, "reverse"), first, count, drawn_steps, fraction, whole)
        return torch.cat([torch.ones(count, 1), inner], 1)

    return factors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """N trajectories to sample, given by their prompts and seeds."""

    prompt: Tensor
    """Prompt numbers `[N]` int64, on the CPU."""
    noise: Sequence[int]
    """Seeds of x_0 and all noise."""
    draws: Sequence[int]
    """Seeds of a method's other draws."""
    shared: int = 0
    """Seed of the draws that all trajectories of an update share."""

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows: Tensor) -> "Trajectories":
        chosen = rows.tolist()
        return Trajectories(
            prompt=self.prompt[rows],
            noise=[self.noise[i] for i in chosen],
            draws=[self.draws[i] for i in chosen],
            shared=self.shared,
        )


class Source(Protocol):
    """Where the trajectories of a rollout's updates come from."""

    rollouts: list[dict[str, float]]
    """Metrics of the stored rollouts, oldest first. The oldest is the one being learned from."""

    def collect(self, rollout_index: int) -> dict[str, float]:
        """Prepare for the updates that learn from rollout `rollout_index`. Returns the rollout's metrics."""

    def select(self, rollout_index: int, numbers: Tensor, again: bool = False) -> Any:
        """The argument of a training step.

        Args:
            rollout_index: number of the rollout.
            numbers: which of its trajectories, `[n]` from 0; only this rank's.
            again: whether an earlier inner epoch has trained on them.
        """

    def finish(self) -> None:
        """Clean up after the last update that learns from a rollout."""


@dataclasses.dataclass(slots=True)
class StoredTrajectories:
    """Stored rollouts, each sampled `replay` rollouts before it is learned from.

    Rollouts 0 to `replay` are all sampled before the first update. From then on one more is sampled whenever the oldest has
    been learned from, until the run has `total`.
    """

    rollout: Callable[[int], dict[str, float]]
    """Samples the rollout of that number into the buffer. Returns its metrics."""
    buffer: TrajectoryBuffer
    """With room for `replay` + 1 rollouts."""
    slots: Tensor
    """Which of a rollout's trajectories are in this buffer, in ascending order, on the CPU."""
    total: int
    """Rollouts of the run."""
    replay: int = 0
    reverse_factors: Callable[[int], Tensor] | None = None
    """The factors `[trajectories, K]` of the reverse residuals of the rollout of that number, by trajectory and kept
    transition. None: all are 1."""
    rollouts: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def collect(self, rollout_index: int) -> dict[str, float]:
        """As `Source.collect`. An interrupted rollout leaves nothing in the buffer."""
        if not self.rollouts:
            self.buffer.clear()
        last = min(rollout_index + self.replay, self.total - 1)
        for ahead in range(rollout_index + len(self.rollouts), last + 1):
            before = len(self.buffer)
            try:
                self.rollouts.append(self.rollout(ahead))
            except BaseException:
                self.buffer.forget(len(self.buffer) - before, newest=True)
                raise
        return self.rollouts[0]

    def select(self, rollout_index: int, numbers: Tensor, again: bool = False) -> Any:
        """As `Source.select`: the drawn transitions, gathered when they are needed."""
        places = torch.searchsorted(self.slots, numbers)
        transitions = self.buffer.select(self.buffer.slots()[places])  # the oldest rollout is the one to learn from
        factors = None if self.reverse_factors is None else self.reverse_factors(rollout_index)[numbers].flatten()
        return dataclasses.replace(transitions, again=again, reverse_factor=factors)

    def finish(self) -> None:
        """As `Source.finish`: drop the oldest rollout."""
        self.buffer.forget(len(self.slots))
        del self.rollouts[0]


@dataclasses.dataclass(slots=True)
class UnsampledTrajectories:
    """The trajectories that a rollout would sample, by prompt and seed, for methods that sample in the training step."""

    seed: int
    count: int
    """Trajectories of a rollout."""
    prompts: int
    """Number of prompts that are trained on."""
    draw: PromptDraw = "cycles"
    updates: int = 1
    """Updates that share a rollout's trajectories."""
    rollouts: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def collect(self, rollout_index: int) -> dict[str, float]:
        """As `Source.collect`: nothing to do."""
        return {}

    def select(self, rollout_index: int, numbers: Tensor, again: bool = False) -> Trajectories:
        """As `Source.select`."""
        first = rollout_index * self.count
        seeds, each = [first + number for number in numbers.tolist()], self.count // self.updates
        return Trajectories(
            prompt=assign_prompts(self.seed, first, self.count, self.prompts, self.draw)[numbers],
            noise=[seed_of(self.seed, "noise", number) for number in seeds],
            draws=[seed_of(self.seed, "draws", number) for number in seeds],
            shared=seed_of(self.seed, "update", seeds[0] // each) if seeds else 0,
        )

    def finish(self) -> None:
        """As `Source.finish`: nothing to do."""
