"""What the training step trains on: transitions of any trajectories and steps, as rows of one batch."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastnabla.trajectories.reference_cache import CachedRows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """M transitions; states `[M, C, H, W]`, the rest `[M]`."""

    x: Tensor
    x_next: Tensor
    model_output: Tensor
    """Guided output of the sampling policy at x, `[M, C, H, W]`."""
    step_index: Tensor
    """Row of the transition table, int64."""
    timestep: Tensor
    """What the buffer was told to be the step's timestep, int64."""
    prompt: Tensor
    """Prompt number, int64."""
    trajectory: Tensor
    """Slot of the trajectory in the buffer, int64."""
    reward: Tensor
    """Reward of the trajectory's sample, float32; NaN if none was given."""
    epoch: Tensor
    """Epoch in which the trajectory was sampled, int64."""

    def __len__(self) -> int:
        return len(self.step_index)

    def __getitem__(self, rows: Tensor | slice) -> "Transitions":
        return Transitions(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def select(self) -> "Selection":
        """All of them, to train on; waits for the device."""
        return Selection(
            step_index=self.step_index.cpu(),
            trajectory=self.trajectory.cpu(),
            prompt=self.prompt.cpu(),
            gather=lambda rows: self[rows.to(self.x.device, non_blocking=True)],
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """M transitions that are gathered when they are needed. What decides how they are computed is on the host, so that
    nobody has to wait for the device to know it."""

    step_index: Tensor
    """`[M]` int64, on the host."""
    trajectory: Tensor
    """`[M]` int64, on the host."""
    prompt: Tensor
    """`[M]` int64, on the host."""
    gather: Callable[[Tensor], Transitions]
    """The transitions at positions `[m]` int64 (on the host) of the selection, on the device."""
    reference: CachedRows | None = None
    """Where the reference network's part of them is kept for later inner epochs, if it is."""
    again: bool = False
    """Whether an earlier inner epoch has gone over them."""

    def __len__(self) -> int:
        return len(self.step_index)

    def __getitem__(self, rows: Tensor | slice) -> "Selection":
        rows = torch.arange(len(self))[rows]
        return Selection(
            step_index=self.step_index[rows],
            trajectory=self.trajectory[rows],
            prompt=self.prompt[rows],
            gather=lambda of: self.gather(rows[of]),
            reference=None if self.reference is None else self.reference[rows],
            again=self.again,
        )
