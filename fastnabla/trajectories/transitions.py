"""The transitions that a training step takes: rows of one batch, from any trajectories and steps."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastnabla.trajectories.reference_cache import CachedRows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """M transitions: states `[M, C, H, W]`, the rest `[M]`, all on one device."""

    x: Tensor
    x_next: Tensor
    model_output: Tensor
    """Guided output of the sampling policy at x, `[M, C, H, W]`."""
    step_index: Tensor
    """Row of the transition table, int64."""
    prompt: Tensor
    """Prompt number, int64."""
    trajectory: Tensor
    """Slot of the trajectory in the buffer, int64."""
    reward: Tensor
    """Reward of the trajectory's finished sample, float32; NaN if none was given, inf if it or the sample is not finite."""

    def __len__(self) -> int:
        return len(self.step_index)

    def __getitem__(self, rows: Tensor | slice) -> "Transitions":
        return Transitions(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def select(self) -> "LazyTransitions":
        """All transitions, in the form that a training step takes. Waits for the device."""
        return LazyTransitions(
            step_index=self.step_index.cpu(),
            trajectory=self.trajectory.cpu(),
            prompt=self.prompt.cpu(),
            gather=lambda rows: self[rows.to(self.x.device, non_blocking=True)],
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LazyTransitions:
    """M transitions that are gathered when they are needed.

    The numbers that decide how to compute them are kept on the CPU to avoid a synchronisation.
    """

    step_index: Tensor
    """`[M]` int64, on the CPU."""
    trajectory: Tensor
    """`[M]` int64, on the CPU."""
    prompt: Tensor
    """`[M]` int64, on the CPU."""
    gather: Callable[[Tensor], Transitions]
    """Rows `[m]` int64, on the CPU → those transitions, on the device."""
    reference: CachedRows | None = None
    """Their places in the cache of the reference network's part, if there is one."""
    again: bool = False
    """Whether an earlier inner epoch has trained on them."""
    reverse_factor: Tensor | None = None
    """Factors `[M]` of the reverse residuals, float32, on the CPU; a transition with 0 has none. None: all are 1. See
    `fastnabla.trajectories.draws.draw_reverse`."""

    def __len__(self) -> int:
        return len(self.step_index)

    def __getitem__(self, rows: Tensor | slice) -> "LazyTransitions":
        rows = torch.arange(len(self))[rows]
        return LazyTransitions(
            step_index=self.step_index[rows],
            trajectory=self.trajectory[rows],
            prompt=self.prompt[rows],
            gather=lambda of: self.gather(rows[of]),
            reference=None if self.reference is None else self.reference[rows],
            again=self.again,
            reverse_factor=None if self.reverse_factor is None else self.reverse_factor[rows],
        )
