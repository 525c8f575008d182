"""The trajectory buffers of all ranks, saved as the one buffer of a run on a single process."""

from typing import Any

from torch import Tensor

from fastnabla.distributed.world import World
from fastnabla.trajectories.buffer import TrajectoryBuffer


class PooledBuffer:
    """Saves and restores a rollout on any number of ranks.

    Args:
        buffer: this rank's trajectories. It was filled from empty, in the order of `slots`.
        world: the ranks.
        slots: which of the rollout's trajectories are this rank's, `[n]`.
        count: trajectories of the rollout.
    """

    def __init__(self, buffer: TrajectoryBuffer, world: World, slots: Tensor, count: int) -> None:
        self.buffer, self.world, self.slots, self.count = buffer, world, slots, count

    def state_dict(self) -> dict[str, Any]:
        """The state of a buffer of all trajectories. Collective."""
        state = self.buffer.state_dict()
        names = self.buffer.saved_tensors()
        whole = {name: self.world.all_gather_rows(state[name], self.slots, self.count) for name in names}
        return state | whole | {"geometry": self.buffer.geometry(self.count), "live": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's trajectories from the state of a buffer of all trajectories.

        Raises:
            ValueError: the state is from a buffer with other arguments, or not complete. Nothing is changed then.
        """
        expected = self.buffer.geometry(self.count)
        if state.get("geometry") != expected:
            raise ValueError(f"the state is from a buffer with {state.get('geometry')}; this buffer has {expected}")
        saved = {name: state[name] for name in self.buffer.saved_tensors() if name in state}
        own = {name: value[self.slots.to(value.device)] for name, value in saved.items()}
        here = {"geometry": self.buffer.geometry(len(self.slots)), "live": len(self.slots)}
        self.buffer.load_state_dict(state | own | here)
