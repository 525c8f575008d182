"""Saving a trajectory buffer's contents and restoring them exactly."""

import threading
from typing import Any

import torch
from torch import Tensor

from fastnabla.trajectories.buffer_progress import Progress
from fastnabla.trajectories.reference_cache import ReferenceCache


class BufferState:
    """The part of `fastnabla.trajectories.buffer.TrajectoryBuffer` that saves its tensors and the position in the ring."""

    x: Tensor
    device: torch.device
    capacity: int
    num_steps: int
    kept: int
    sample_shape: tuple[int, ...]
    output_block: int | None
    reference: ReferenceCache | None
    _progress: Progress
    _first: int
    _live: int
    _lock: threading.Lock

    def state_dict(self) -> dict[str, Any]:
        """Everything in the buffer, on the CPU. Waits for the device."""
        self._wait()
        tensors = {name: getattr(self, name).to("cpu", copy=True) for name in self.saved_tensors()}
        numbers = {"geometry": self.geometry(self.capacity), "first": self._first, "live": self._live}
        cached = {} if self.reference is None else {"reference": self.reference.state_dict()}
        return numbers | cached | tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved. Other keys, such as `epoch` and `timestep` from older versions, are ignored.

        Raises:
            ValueError: the state is from a buffer with other arguments, or not complete. Nothing is changed then.
        """
        geometry = self.geometry(self.capacity)
        if state.get("geometry") != geometry:
            raise ValueError(f"the state is from a buffer with {state.get('geometry')}; this buffer has {geometry}")
        cached = () if self.reference is None else ("reference",)
        missing = {"first", "live", *cached, *self.saved_tensors()} - state.keys()
        if missing:
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}")
        self._wait()
        with self._lock:
            for name in self.saved_tensors():
                getattr(self, name).copy_(state[name])
            if self.reference is not None:
                self.reference.load_state_dict(state["reference"])
            self._first, self._live = state["first"], state["live"]
            self._progress.reload()

    def saved_tensors(self) -> list[str]:
        """Names of the tensors in the state. The first dimension of each is the slot."""
        return [name for name, value in vars(self).items() if isinstance(value, Tensor)]

    def geometry(self, capacity: int) -> str:
        """The arguments that a state must match, for a buffer like this one with `capacity` trajectories."""
        return (
            f"capacity {capacity}, {self.num_steps} steps, {self.kept} kept, sample_shape {self.sample_shape}, "
            f"{self.x.dtype}, output_block {self.output_block}"
        )

    def _wait(self) -> None:
        """Wait until kernels have finished with slabs in host memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
