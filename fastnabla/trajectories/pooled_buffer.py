"""All ranks' trajectory buffers as the one that a run alone would have: what a checkpoint keeps of them."""

from typing import Any

from torch import Tensor

from fastnabla.distributed.world import World
from fastnabla.trajectories.buffer import TrajectoryBuffer


class PooledBuffer:
    """The state of a rollout, whatever number of ranks share it.

    Args:
        buffer: this rank's trajectories, filled from empty, each in its place among `slots`.
        world: the ranks.
        slots: `[n]` of the rollout's trajectories that are here.
        count: of trajectories in all.
    """

    def __init__(self, buffer: TrajectoryBuffer, world: World, slots: Tensor, count: int) -> None:
        self.buffer, self.world, self.slots, self.count = buffer, world, slots, count

    def state_dict(self) -> dict[str, Any]:
        """That of a buffer of all trajectories; collective."""
        state = self.buffer.state_dict()
        whole = {name: self.world.all_gather_rows(state[name], self.slots, self.count) for name in self._by_slot(state)}
        return state | whole | {"geometry": self.buffer.geometry(self.count), "live": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's trajectories from the state of a buffer of all.

        Raises:
            ValueError: it is of a buffer with other arguments, or is not complete. Nothing has been changed then.
        """
        expected = self.buffer.geometry(self.count)
        if state.get("geometry") != expected:
            raise ValueError(f"the state is of a buffer of {state.get('geometry')}, this is one of {expected}")
        own = {name: state[name][self.slots.to(state[name].device)] for name in self._by_slot(state)}
        here = {"geometry": self.buffer.geometry(len(self.slots)), "live": len(self.slots)}
        self.buffer.load_state_dict(state | own | here)

    def _by_slot(self, state: dict[str, Any]) -> list[str]:
        return [name for name, value in state.items() if isinstance(value, Tensor) and name != "timestep"]
