"""What the training step trains on: transitions of any trajectories and steps, as rows of one batch."""

import dataclasses

from torch import Tensor


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
