"""The trajectory buffer, which stores only the transitions that will be trained on.

The steps to keep are drawn before a trajectory is sampled. Neighbouring steps share the state between them, so a
trajectory with K kept steps stores at most 2K states, each once. It is a ring buffer: the oldest trajectories are removed
first.

`fastnabla.trajectories.buffer_ops` moves the data, with one launch per operation, in C++ and CUDA or in plain torch.
"""

import math
import threading
from typing import Literal, get_args

import torch
from torch import Tensor

from fastnabla.trajectories import buffer_ops
from fastnabla.trajectories.buffer_progress import Progress
from fastnabla.trajectories.buffer_state import BufferState
from fastnabla.trajectories.pinned_memory import pinned
from fastnabla.trajectories.reference_cache import ReferenceCache
from fastnabla.trajectories.transitions import LazyTransitions, Transitions

Storage = Literal["device", "pinned"]


class TrajectoryBuffer(BufferState):
    """Slabs for `capacity` trajectories of `num_steps` steps, of which `kept` are stored.

    For each slot, `reserve` it for the drawn steps, `append` each step of the rollout, set its `reward`, and `gather` its
    transitions. One thread may append to some slots while another gathers from others. Use one stream for a rollout.

    Pinned slabs take exactly `nbytes` of host memory, rounded up to pages. The buffer's methods wait for the device before
    the host reads, writes or frees them; wait yourself before you touch `x`, `model_output` or `scales`.

    Args:
        capacity: trajectories.
        num_steps: T.
        kept: K, the number of drawn steps per trajectory, including repetitions.
        sample_shape: (C, H, W) of the states.
        dtype: of the stored states and outputs.
        device: where transitions are gathered to.
        storage: "device" keeps the slabs on `device`; "pinned" in page-locked host memory, which the GPU reads over the
            host link when it gathers. On a CPU they are the same.
        output_block: if given, outputs are stored in 8 bits with a float32 scale for each block of this many elements of a
            row (64, 128 or 256): the error is at most 1/254 of the block's largest element. States are never quantised.

    Raises:
        ValueError: a number is out of range.
        MemoryError: the host cannot lock that much memory.
    """

    def __init__(
        self,
        capacity: int,
        num_steps: int,
        kept: int,
        sample_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        storage: Storage = "device",
        output_block: int | None = None,
    ) -> None:
        if storage not in get_args(Storage):
            raise ValueError(f"storage = {storage!r}: expected one of {get_args(Storage)}")
        if output_block not in (None, 64, 128, 256):
            raise ValueError(f"output_block = {output_block}: expected 64, 128 or 256 elements, or None for no blocks")
        for name, value in {"capacity": capacity, "num_steps": num_steps, "kept": kept}.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if not sample_shape or min(sample_shape) < 1:
            raise ValueError(f"sample_shape = {tuple(sample_shape)}: expected one or more sizes, all at least 1")
        self.capacity, self.num_steps, self.kept = capacity, num_steps, kept
        self.sample_shape, self.output_block, self.storage = tuple(sample_shape), output_block, storage
        self.device = torch.device(device)
        states, size = min(2 * kept, num_steps + 1), math.prod(sample_shape)
        self.x = self._slab((capacity, states, *sample_shape), dtype)
        self.model_output = self._slab((capacity, kept, *sample_shape), torch.int8 if output_block else dtype)
        self.scales = self._slab((capacity, kept, -(-size // output_block)), torch.float32) if output_block else None
        self.steps = torch.zeros(capacity, kept, dtype=torch.int64, device=device)
        self.prompt = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.reward = torch.full((capacity,), float("nan"), device=device)
        # Position in the slab of state i, or of step i's output; -1 if it is not kept.
        self._state_at = torch.full((capacity, num_steps + 1), -1, dtype=torch.int32, device=device)
        self._output_at = torch.full((capacity, num_steps), -1, dtype=torch.int32, device=device)
        # Copies on the host, where indices are checked.
        on_host = self.device.type == "cpu"
        self._host_state_at = self._state_at if on_host else self._state_at.cpu()
        self._host_output_at = self._output_at if on_host else self._output_at.cpu()
        self._host_steps = self.steps if on_host else self.steps.cpu()
        self._host_prompt = self.prompt if on_host else self.prompt.cpu()
        self._appended = torch.zeros(capacity, dtype=torch.int64)
        self._progress = Progress(self._appended, num_steps, self.device, self._check_reserved)
        self._first = self._live = 0
        self.reference: ReferenceCache | None = None
        self._lock = threading.Lock()

    def _slab(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.storage == "device" or self.device.type != "cuda":
            return torch.empty(shape, dtype=dtype, device=self.device)
        try:
            return pinned(shape, dtype, self.device)
        except MemoryError as error:
            raise MemoryError(
                f"storage = {self.storage!r}: {error}. Store fewer trajectories or steps, set output_block, or use "
                "storage='device'."
            ) from error

    def __len__(self) -> int:
        return self._live

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs."""
        return sum(slab.nbytes for slab in (self.x, self.model_output, self.scales) if slab is not None)

    def slots(self) -> Tensor:
        """Slots of the trajectories, oldest first, `[n]` int64 on the host."""
        return (self._first + torch.arange(self._live)) % self.capacity

    def keep_reference(self, with_product: bool) -> None:
        """Cache the reference network's part of each transition from now on, for later inner epochs.

        Args:
            with_product: cache its vector-Jacobian products too.
        """
        geometry = (self.capacity, self.kept, self.sample_shape)
        self.reference = ReferenceCache(*geometry, with_product, self.device)

    def clear(self) -> None:
        """Forget all trajectories. The slabs stay allocated."""
        with self._lock:
            self._forget(self._live)
            self._first = 0

    def forget(self, count: int, newest: bool = False) -> None:
        """Forget the `count` oldest trajectories, or the newest ones, complete or not.

        Raises:
            ValueError: the buffer has fewer trajectories.
        """
        if not 0 <= count <= self._live:
            raise ValueError(f"count = {count}: must be between 0 and {self._live}, the trajectories in the buffer")
        with self._lock:
            self._forget(count, newest)

    def _forget(self, count: int, newest: bool = False) -> None:
        gone = self.slots()[self._live - count :] if newest else self.slots()[:count]
        for table, nothing in ((self._state_at, -1), (self._output_at, -1), (self.reward, float("nan"))):
            table[self._on_device(gone)] = nothing
        self._host_state_at[gone] = self._host_output_at[gone] = -1
        self._progress.forget(gone)
        if self.reference is not None:
            self.reference.forget(gone)
        self._live -= count
        if not newest:
            self._first = (self._first + count) % self.capacity

    def reserve(self, steps: Tensor, prompt: Tensor) -> Tensor:
        """Reserve a slot for each of B trajectories.

        Args:
            steps: steps to keep, `[B, K]` int64.
            prompt: prompt numbers, `[B]` int64.

        Returns:
            The slots, `[B]` int64 on the host.

        Raises:
            ValueError: a step is out of range, or a shape or dtype is wrong.
            RuntimeError: the buffer is full.
        """
        if steps.dim() != 2 or steps.shape[1] != self.kept or prompt.shape != steps.shape[:1]:
            raise ValueError(
                f"steps {tuple(steps.shape)}, prompt {tuple(prompt.shape)}: expected [B, {self.kept}] and [B]"
            )
        for name, numbers in (("steps", steps), ("prompt", prompt)):
            if numbers.dtype != torch.int64:
                raise ValueError(f"{name} has dtype {numbers.dtype}, expected torch.int64")
        steps, count = steps.cpu(), len(steps)
        if count and not 0 <= int(steps.min()) <= int(steps.max()) < self.num_steps:
            raise ValueError(f"steps must be in 0..{self.num_steps - 1}; found {int(steps.min())}..{int(steps.max())}")
        states = torch.zeros(count, self.num_steps + 1, dtype=torch.bool)
        states.scatter_(1, steps, True).scatter_(1, steps + 1, True)
        outputs = torch.zeros(count, self.num_steps, dtype=torch.bool).scatter_(1, steps, True)
        state_at, output_at = (torch.where(kept, kept.cumsum(1) - 1, -1).int() for kept in (states, outputs))
        with self._lock:
            if self._live + count > self.capacity:
                raise RuntimeError(
                    f"the buffer is full: {self._live} of {self.capacity} trajectories reserved, {count} more asked "
                    "for; clear() it, or forget() the oldest"
                )
            slots = (self._first + self._live + torch.arange(count)) % self.capacity
            self._live += count
            self._host_state_at[slots], self._host_output_at[slots] = state_at, output_at
            self._host_steps[slots], self._host_prompt[slots] = steps, prompt.cpu()
            where = self._on_device(slots)
            for table, values in (
                (self._state_at, state_at),
                (self._output_at, output_at),
                (self.steps, steps),
                (self.prompt, prompt),
            ):
                table[where] = self._on_device(values)
        return slots

    @torch.no_grad()
    def append(self, slots: Tensor, step: int, x: Tensor, model_output: Tensor, x_next: Tensor) -> None:
        """Record a step of the trajectories in `slots [B]`. States and outputs that were not drawn are dropped.

        Args:
            slots: as `reserve` returned them.
            step: number of the step; call in order, from 0.
            x, model_output, x_next: `[B, C, H, W]`.

        Raises:
            IndexError: a slot is not reserved.
            ValueError: a shape is wrong, a slot is given twice, or a step is out of order. Nothing is written then.
        """
        expected = (len(slots), *self.sample_shape)
        for name, tensor in {"x": x, "model_output": model_output, "x_next": x_next}.items():
            if tensor.shape != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        with self._lock:
            group = self._progress.group(slots, step)
        buffer_ops.append(*self._slabs(), group.where, step, x, model_output, x_next)
        self._progress.advance(group)

    def transitions(self, slots: Tensor | None = None) -> Tensor:
        """Numbers `[M]` of all kept transitions (of the trajectories in `slots`), as `gather` takes them."""
        slots = self.slots() if slots is None else slots
        return (slots[:, None] * self.kept + torch.arange(self.kept)).flatten()

    def select(self, slots: Tensor | None = None) -> LazyTransitions:
        """All kept transitions (of the trajectories in `slots`), to be gathered when they are needed."""
        index = self.transitions(slots)
        slots = index // self.kept
        return LazyTransitions(
            step_index=self._host_steps.flatten()[index],
            trajectory=slots,
            prompt=self._host_prompt[slots],
            gather=lambda rows: self.gather(index[rows]),
            reference=None if self.reference is None else self.reference.of(index),
        )

    def gather(self, index: Tensor, dtype: torch.dtype | None = None) -> Transitions:
        """The transitions numbered `index [M]`, on the buffer's device.

        Args:
            index: slot · K + position among the drawn steps, int64.
            dtype: of the states and outputs; None for the stored dtype.

        Raises:
            IndexError: a slot is not reserved.
            RuntimeError: a trajectory is not complete.
            torch.OutOfMemoryError: the GPU has no room for them.
        """
        index = index.cpu().contiguous()
        slots = index // self.kept
        self._check_reserved(slots)
        if not bool(self._progress.complete(slots).all()):
            raise RuntimeError("gather before the rollout is complete: append the remaining steps first")
        numbers = (self.steps, self.prompt, self.reward)
        fields = buffer_ops.gather(*self._slabs(), *numbers, self._on_device(index), dtype or self.x.dtype)
        return Transitions(**dict(zip(buffer_ops.FIELDS, fields, strict=True)))

    def _slabs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        return self.x, self.model_output, self.scales, self._state_at, self._output_at

    def _on_device(self, numbers: Tensor) -> Tensor:
        """Does not wait for the device: CUDA copies ordinary host memory before the call returns."""
        return numbers.to(self.device, non_blocking=True)

    def _check_reserved(self, slots: Tensor) -> None:
        inside = not len(slots) or 0 <= int(slots.min()) <= int(slots.max()) < self.capacity
        if not inside or (
            self._live < self.capacity and bool(((slots - self._first) % self.capacity >= self._live).any())
        ):
            raise IndexError(f"slots must be reserved ones, {self.slots().tolist()}; found {slots.tolist()}")
