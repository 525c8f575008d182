"""The trajectory buffer: the transitions that will be trained on, and nothing else.

Which steps of a trajectory are kept is drawn before it is sampled. Neighbouring steps share the state between
them, so a trajectory with K kept steps stores at most 2K states, each once.
"""

import dataclasses

import torch
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
    prompt: Tensor
    """Prompt number, int64."""
    trajectory: Tensor
    """Slot of the trajectory in the buffer, int64."""

    def __len__(self) -> int:
        return len(self.step_index)

    def __getitem__(self, rows: Tensor | slice) -> "Transitions":
        return Transitions(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


def draw_stratified(trajectories: int, num_steps: int, strata: int, generator: torch.Generator) -> Tensor:
    """Steps to keep, `[trajectories, strata + 1]` int64: one uniform draw in each of `strata` equal parts of the
    trajectory, and the last step always.

    This is the reference implementation's low-variance subsampling. A stratum may draw the last step again.

    Raises:
        ValueError: `strata` is not a positive divisor of `num_steps`.
    """
    if strata < 1 or num_steps % strata:
        raise ValueError(
            f"strata = {strata}: must be at least 1 and divide the number of steps, {num_steps}; "
            "change rollout.fraction or sampler.steps so that steps * fraction does."
        )
    width = num_steps // strata
    within = torch.randint(0, width, (trajectories, strata), generator=generator)
    last = torch.full((trajectories, 1), num_steps - 1)
    return torch.cat([last, torch.arange(strata) * width + within], 1)


def draw_uniform(trajectories: int, num_steps: int, draws: int, generator: torch.Generator) -> Tensor:
    """Steps to keep, `[trajectories, draws + 1]` int64: `draws` different steps before the last, and the last.

    Raises:
        ValueError: there are not `draws` steps before the last, or `draws` is not positive.
    """
    if not 1 <= draws < num_steps:
        raise ValueError(f"draws = {draws}: must be between 1 and {num_steps - 1}, the steps before the last.")
    order = torch.rand(trajectories, num_steps - 1, generator=generator).argsort(1)
    return torch.cat([torch.full((trajectories, 1), num_steps - 1), order[:, :draws]], 1)


class TrajectoryBuffer:
    """Slabs for `capacity` trajectories of `num_steps` steps, of which `kept` are stored.

    Life of a slot: `reserve` it with its drawn steps, `append` every step of the rollout, `gather`.

    Args:
        capacity: trajectories.
        num_steps: T.
        kept: K, drawn steps a trajectory, repetitions included.
        sample_shape: (C, H, W) of the states.
        dtype: of the stored states and outputs.
        device: of the slabs.
    """

    def __init__(
        self,
        capacity: int,
        num_steps: int,
        kept: int,
        sample_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity, self.num_steps, self.kept = capacity, num_steps, kept
        self.sample_shape = tuple(sample_shape)
        states = min(2 * kept, num_steps + 1)
        self.x = torch.empty(capacity, states, *sample_shape, dtype=dtype, device=device)
        self.model_output = torch.empty(capacity, kept, *sample_shape, dtype=dtype, device=device)
        self.steps = torch.zeros(capacity, kept, dtype=torch.int64, device=device)
        self.prompt = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.reward = torch.full((capacity,), float("nan"), device=device)
        # Where state i (output of step i) of a trajectory lies in its slab; -1 where it is not kept.
        self._state_at = torch.full((capacity, num_steps + 1), -1, dtype=torch.int64)
        self._output_at = torch.full((capacity, num_steps), -1, dtype=torch.int64)
        self._appended = torch.zeros(capacity, dtype=torch.int64)
        self._reserved = 0

    def __len__(self) -> int:
        return self._reserved

    def clear(self) -> None:
        """Forget all trajectories; the slabs stay."""
        self._reserved = 0
        self._state_at.fill_(-1)
        self._output_at.fill_(-1)
        self._appended.zero_()
        self.reward.fill_(float("nan"))

    def reserve(self, steps: Tensor, prompt: Tensor) -> Tensor:
        """Slots `[B]` for trajectories that will keep `steps [B, K]` of prompts `prompt [B]`.

        Raises:
            ValueError: a step is out of range or the shapes are wrong.
            RuntimeError: the buffer is full.
        """
        if steps.dim() != 2 or steps.shape[1] != self.kept or prompt.shape != steps.shape[:1]:
            raise ValueError(
                f"steps {tuple(steps.shape)}, prompt {tuple(prompt.shape)}: expected [B, {self.kept}] and [B]"
            )
        if len(steps) and not 0 <= int(steps.min()) <= int(steps.max()) < self.num_steps:
            raise ValueError(f"steps must be in 0..{self.num_steps - 1}; found {int(steps.min())}..{int(steps.max())}")
        first, count = self._reserved, len(steps)
        if first + count > self.capacity:
            raise RuntimeError(
                f"the buffer is full: {first} of {self.capacity} trajectories reserved, {count} more asked for; clear() it"
            )
        self._reserved += count
        slots = torch.arange(first, first + count)
        steps = steps.cpu()
        rows = slots[:, None]
        needed = torch.zeros(count, self.num_steps + 1, dtype=torch.bool)
        needed.scatter_(1, steps, True).scatter_(1, steps + 1, True)
        self._state_at[slots] = torch.where(needed, needed.cumsum(1) - 1, -1)
        drawn = torch.zeros(count, self.num_steps, dtype=torch.bool).scatter_(1, steps, True)
        self._output_at[slots] = torch.where(drawn, drawn.cumsum(1) - 1, -1)
        self.steps[rows] = steps[:, None].to(self.steps.device)
        self.prompt[slots] = prompt.to(self.prompt.device)
        return slots

    def append(self, slots: Tensor, step: int, x: Tensor, model_output: Tensor, x_next: Tensor) -> None:
        """Record step `step` (in order, from 0) of the trajectories in `slots [B]`; what was not drawn is dropped.

        Args:
            slots: as `reserve` returned them.
            step: number of the step.
            x, model_output, x_next: `[B, C, H, W]`.

        Raises:
            IndexError: a slot is not reserved.
            ValueError: wrong shape, or a step out of order.
        """
        expected = (len(slots), *self.sample_shape)
        for name, tensor in (("x", x), ("model_output", model_output), ("x_next", x_next)):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < self._reserved:
            raise IndexError(f"slots must be in 0..{self._reserved - 1}, found {slots.tolist()}")
        if bool((self._appended[slots] != step).any()) or step >= self.num_steps:
            raise ValueError(
                f"step {step} is out of order: next is {self._appended[slots].tolist()} of {self.num_steps}"
            )
        self._appended[slots] += 1
        for where, slab, values in (
            (self._state_at[slots, step], self.x, x),
            (self._state_at[slots, step + 1], self.x, x_next),
            (self._output_at[slots, step], self.model_output, model_output),
        ):
            kept = where >= 0
            slab[slots[kept], where[kept]] = values[kept.to(values.device)].to(slab)

    def transitions(self, slots: Tensor | None = None) -> Tensor:
        """Numbers `[M]` of all kept transitions (of the trajectories in `slots`), as `gather` takes them."""
        slots = torch.arange(self._reserved) if slots is None else slots
        return (slots[:, None] * self.kept + torch.arange(self.kept)).flatten()

    def gather(self, index: Tensor, dtype: torch.dtype | None = None) -> Transitions:
        """The transitions numbered `index [M]` (slot * K + position among the drawn steps), on the buffer's device.

        Raises:
            IndexError: a number is out of range.
            RuntimeError: a trajectory is not complete.
        """
        index = index.cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self._reserved * self.kept:
            raise IndexError(f"transition numbers must be in 0..{self._reserved * self.kept - 1}")
        slots = index // self.kept
        if bool((self._appended[slots] < self.num_steps).any()):
            raise RuntimeError("gather before the rollout is complete: append the remaining steps first")
        step = self.steps[slots, index % self.kept]
        host_step = step.cpu()
        return Transitions(
            x=self.x[slots, self._state_at[slots, host_step]].to(dtype),
            x_next=self.x[slots, self._state_at[slots, host_step + 1]].to(dtype),
            model_output=self.model_output[slots, self._output_at[slots, host_step]].to(dtype),
            step_index=step,
            prompt=self.prompt[slots],
            trajectory=slots.to(step.device),
        )
