"""The trajectory buffer: the transitions that will be trained on, and nothing else.

Which steps of a trajectory are kept is drawn before it is sampled. Neighbouring steps share the state between them,
so a trajectory with K kept steps stores at most 2K states, each once. The buffer is a ring: trajectories leave it
oldest first, when they have been learned from or when room is needed.

Data moves through the operations of `fastnabla.trajectories.buffer_ops`, one launch each: C++ and CUDA, or plain torch.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fastnabla.trajectories import buffer_ops
from fastnabla.trajectories.buffer_progress import Progress
from fastnabla.trajectories.buffer_state import BufferState
from fastnabla.trajectories.pinned_memory import pinned
from fastnabla.trajectories.reference_cache import ReferenceCache
from fastnabla.trajectories.transitions import Selection, Transitions

Storage = Literal["device", "pinned", "prefetch"]


class TrajectoryBuffer(BufferState):
    """Slabs for `capacity` trajectories of `num_steps` steps, of which `kept` are stored.

    Life of a slot: `reserve` it with its drawn steps, `append` the rollout's steps, set `reward`, `gather`. One thread
    may append to some slots while another gathers from others; all on the current stream, the same for a whole rollout.

    Pinned slabs take exactly `nbytes` of the host's memory, in whole pages. Their methods wait for the device where the
    host reads or writes them, and so does freeing them; do so too before you touch `x`, `model_output` or `scales`.

    Args:
        capacity: trajectories.
        num_steps: T.
        kept: K, drawn steps a trajectory, repetitions included.
        sample_shape: (C, H, W) of the states.
        dtype: of the stored states and outputs.
        device: where transitions are wanted.
        storage: where the slabs are. "device": on `device`. "pinned": in page-locked host memory, which the GPU reads
            over the host link when it gathers. "prefetch": there too, and `batches` copies the next batch on a stream
            of its own while the current one is used. On a CPU all three are the same.
        output_block: store outputs in 8 bits, with a float32 scale for each block of this many elements of a row
            (64, 128 or 256): an element is off by at most 1/254 of its block's largest. None: in `dtype`. States are
            never quantised.
        timestep: timesteps by step `[T]`, given back with the transitions; the steps' numbers if None.

    Raises:
        ValueError: a number is out of range.
        MemoryError: the host has not that much page-locked memory.
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
        timestep: Tensor | None = None,
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
        if timestep is not None and timestep.shape != (num_steps,):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}, expected ({num_steps},)")
        self.capacity, self.num_steps, self.kept = capacity, num_steps, kept
        self.sample_shape, self.output_block, self.storage = tuple(sample_shape), output_block, storage
        self.device = torch.device(device)
        states, size = min(2 * kept, num_steps + 1), math.prod(sample_shape)
        self.x = self._slab((capacity, states, *sample_shape), dtype)
        self.model_output = self._slab((capacity, kept, *sample_shape), torch.int8 if output_block else dtype)
        self.scales = self._slab((capacity, kept, -(-size // output_block)), torch.float32) if output_block else None
        self.steps = torch.zeros(capacity, kept, dtype=torch.int64, device=device)
        self.prompt = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.epoch = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.reward = torch.full((capacity,), float("nan"), device=device)
        self.timestep = (torch.arange(num_steps) if timestep is None else timestep.clone()).to(device)
        # Where state i (output of step i) of a trajectory lies in its slab; -1 where it is not kept.
        self._state_at = torch.full((capacity, num_steps + 1), -1, dtype=torch.int32, device=device)
        self._output_at = torch.full((capacity, num_steps), -1, dtype=torch.int32, device=device)
        # The same on the host, where indices are checked.
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
        self._stream = torch.cuda.Stream(self.device) if storage == "prefetch" and not on_host else None

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
        """From now on keep what the reference network gives for each transition, to be used in later inner epochs.

        Args:
            with_product: its vector-Jacobian products too.
        """
        geometry = (self.capacity, self.kept, self.sample_shape)
        self.reference = ReferenceCache(*geometry, with_product, self.device)

    def clear(self) -> None:
        """Forget all trajectories; the slabs stay."""
        with self._lock:
            self._forget(self._live)
            self._first = 0

    def forget(self, count: int, newest: bool = False) -> None:
        """Forget the `count` oldest trajectories, or the newest, complete or not.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= count <= self._live:
            raise ValueError(f"count = {count}: must be between 0 and {self._live}, the trajectories that are there")
        with self._lock:
            self._forget(count, newest)

    def _forget(self, count: int, newest: bool = False) -> None:
        gone = self.slots()[self._live - count :] if newest else self.slots()[:count]
        self._wait_for_prefetch()
        for table, nothing in ((self._state_at, -1), (self._output_at, -1), (self.reward, float("nan"))):
            table[self._on_device(gone)] = nothing
        self._host_state_at[gone] = self._host_output_at[gone] = -1
        self._progress.forget(gone)
        if self.reference is not None:
            self.reference.forget(gone)
        self._live -= count
        if not newest:
            self._first = (self._first + count) % self.capacity

    def reserve(self, steps: Tensor, prompt: Tensor, epoch: int = 0, evict: bool = False) -> Tensor:
        """Slots `[B]` for trajectories that will keep `steps [B, K]` of prompts `prompt [B]`.

        Args:
            steps: numbers of the drawn steps, int64.
            prompt: prompt numbers, int64.
            epoch: of the rollout, for `age`.
            evict: forget the oldest trajectories if there is no room for the new ones.

        Raises:
            ValueError: a step is out of range or the shapes are wrong.
            RuntimeError: the buffer is full, or would have to forget a trajectory that is not complete.
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
            excess = self._live + count - self.capacity
            if excess > 0:
                self._make_room(excess, count, evict)
            slots = (self._first + self._live + torch.arange(count)) % self.capacity
            self._live += count
            self._host_state_at[slots], self._host_output_at[slots], self._host_steps[slots] = (
                state_at,
                output_at,
                steps,
            )
            self._host_prompt[slots] = prompt.cpu()
            where = self._on_device(slots)
            self._wait_for_prefetch()
            for table, values in (
                (self._state_at, state_at),
                (self._output_at, output_at),
                (self.steps, steps),
                (self.prompt, prompt),
            ):
                table[where] = self._on_device(values)
            self.epoch[where] = epoch
        return slots

    def _make_room(self, excess: int, count: int, evict: bool) -> None:
        if not evict or count > self.capacity:
            raise RuntimeError(
                f"the buffer is full: {self._live} of {self.capacity} trajectories reserved, {count} more asked for; "
                "clear() it, or reserve(..., evict=True) no more than its capacity"
            )
        oldest = self.slots()[:excess]
        if not bool(self._progress.complete(oldest).all()):
            raise RuntimeError(f"no room for {count} trajectories: the oldest {excess} are not all complete")
        self._forget(excess)

    @torch.no_grad()
    def append(self, slots: Tensor, step: int, x: Tensor, model_output: Tensor, x_next: Tensor) -> None:
        """Record step `step` (in order, from 0) of the trajectories in `slots [B]`; what was not drawn is dropped.

        Args:
            slots: as `reserve` returned them.
            step: number of the step.
            x, model_output, x_next: `[B, C, H, W]`.

        Raises:
            IndexError: a slot is not reserved.
            ValueError: wrong shape, a slot twice, or a step out of order. Nothing has been written then.
        """
        self._check_shapes((len(slots), *self.sample_shape), x=x, model_output=model_output, x_next=x_next)
        with self._lock:
            group = self._progress.group(slots, step)
        self._wait_for_prefetch()
        buffer_ops.append(*self._slabs(), group.where, step, x, model_output, x_next)
        self._progress.advance(group)

    @torch.no_grad()
    def append_steps(self, slots: Tensor, x: Tensor, model_output: Tensor) -> None:
        """Record whole trajectories, in slots of which nothing is recorded yet.

        Args:
            slots: `[B]` as `reserve` returned them.
            x: all states, `[B, T + 1, C, H, W]`.
            model_output: all outputs, `[B, T, C, H, W]`.

        Raises:
            IndexError, ValueError: as `append`.
        """
        self._check_shapes((len(slots), self.num_steps + 1, *self.sample_shape), x=x)
        self._check_shapes((len(slots), self.num_steps, *self.sample_shape), model_output=model_output)
        with self._lock:
            group = self._progress.group(slots, 0)
        self._wait_for_prefetch()
        buffer_ops.append_steps(*self._slabs(), group.where, x, model_output)
        self._progress.advance(group, self.num_steps)

    def transitions(self, slots: Tensor | None = None) -> Tensor:
        """Numbers `[M]` of all kept transitions (of the trajectories in `slots`), as `gather` takes them."""
        slots = self.slots() if slots is None else slots
        return (slots[:, None] * self.kept + torch.arange(self.kept)).flatten()

    def select(self, slots: Tensor | None = None) -> Selection:
        """All kept transitions (of the trajectories in `slots`), to be gathered when they are needed."""
        index = self.transitions(slots)
        slots = index // self.kept
        return Selection(
            step_index=self._host_steps.flatten()[index],
            trajectory=slots,
            prompt=self._host_prompt[slots],
            gather=lambda rows: self.gather(index[rows]),
            reference=None if self.reference is None else self.reference.of(index),
        )

    def gather(self, index: Tensor, dtype: torch.dtype | None = None) -> Transitions:
        """The transitions numbered `index [M]` (slot * K + position among the drawn steps), on the buffer's device.

        Args:
            index: int64.
            dtype: of the states and outputs; that of the stored states if None.

        Raises:
            IndexError: a number is of a slot that is not reserved.
            RuntimeError: a trajectory is not complete.
            torch.OutOfMemoryError: the GPU has no room for them.
        """
        index = index.cpu().contiguous()
        slots = index // self.kept
        self._check_reserved(slots)
        if not bool(self._progress.complete(slots).all()):
            raise RuntimeError("gather before the rollout is complete: append the remaining steps first")
        numbers = (self.steps, self.prompt, self.reward, self.epoch, self.timestep)
        fields = buffer_ops.gather(*self._slabs(), *numbers, self._on_device(index), dtype or self.x.dtype)
        return Transitions(**dict(zip(buffer_ops.FIELDS, fields, strict=True)))

    def batches(self, index: Tensor, size: int, dtype: torch.dtype | None = None) -> Iterator[Transitions]:
        """`gather` of `index` in batches of `size`. With storage="prefetch" on a GPU, the next batch is copied while the
        current one is used."""
        parts = index.split(size)
        if self._stream is None:
            yield from (self.gather(part, dtype) for part in parts)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        ready = None
        for part in (*parts, None):
            taken, ready = ready, None
            if taken is not None:
                current.wait_stream(self._stream)
                for field in dataclasses.fields(taken):
                    getattr(taken, field.name).record_stream(current)
            if part is not None:
                with torch.cuda.stream(self._stream):
                    ready = self.gather(part, dtype)
            if taken is not None:
                yield taken

    def draw(self, count: int, generator: torch.Generator, temperature: float | None = None) -> Tensor:
        """Slots `[count]` of complete trajectories, drawn independently: uniformly, or in proportion to
        ``exp(reward / temperature)``.

        Raises:
            RuntimeError: no trajectory is complete, or one has no reward where rewards matter.
            ValueError: the count or the temperature is not positive.
        """
        if count < 1:
            raise ValueError(f"count = {count}: must be at least 1")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature = {temperature}: must be positive, or None for uniform draws")
        slots = self.slots()
        slots = slots[self._progress.complete(slots)]
        if not len(slots):
            raise RuntimeError("draw from a buffer without a complete trajectory")
        weights = torch.ones(len(slots), dtype=torch.float64)
        if temperature is not None:
            rewards = self.reward.cpu()[slots].double()
            if not bool(rewards.isfinite().all()):
                raise RuntimeError("draw by reward: set buffer.reward of every complete trajectory to a finite number")
            weights = torch.softmax(rewards / temperature, 0)
        return slots[torch.multinomial(weights, count, replacement=True, generator=generator)]

    def age(self, epoch: int) -> Tensor:
        """Epochs since each trajectory was sampled, as of `epoch`, in the order of `slots`, `[n]` int64."""
        return epoch - self.epoch.cpu()[self.slots()]

    def _slabs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        return self.x, self.model_output, self.scales, self._state_at, self._output_at

    def _on_device(self, numbers: Tensor) -> Tensor:
        """Without waiting for the device: CUDA takes a copy of ordinary host memory before the call returns."""
        return numbers.to(self.device, non_blocking=True)

    def _wait_for_prefetch(self) -> None:
        """The current stream, before it writes what a batch that nobody took may still be read from."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _check_shapes(self, expected: tuple[int, ...], **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            if tensor.shape != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")

    def _check_reserved(self, slots: Tensor) -> None:
        inside = not len(slots) or 0 <= int(slots.min()) <= int(slots.max()) < self.capacity
        if not inside or (
            self._live < self.capacity and bool(((slots - self._first) % self.capacity >= self._live).any())
        ):
            raise IndexError(f"slots must be reserved ones, {self.slots().tolist()}; found {slots.tolist()}")
