"""The trajectory buffers of all ranks, saved as the one buffer of a run on a single process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnabla.distributed.world import World
from fastnabla.trajectories.buffer import TrajectoryBuffer


class PooledBuffer:
    """Saves and restores the stored rollouts on any number of ranks.

    Args:
        buffer: this rank's trajectories: whole rollouts, each in the order of `slots`. Its capacity is a multiple of n.
        world: the ranks.
        slots: which of a rollout's trajectories are this rank's, `[n]`.
        count: trajectories of a rollout.
    """

    def __init__(self, buffer: TrajectoryBuffer, world: World, slots: Tensor, count: int) -> None:
        self.buffer, self.world, self.count, self.own = buffer, world, count, len(slots)
        rollouts = buffer.capacity // self.own
        self.capacity = rollouts * count
        self.places = (torch.arange(rollouts)[:, None] * count + slots).flatten()
        """Where this rank's trajectories are among those of all ranks, both oldest first, `[buffer.capacity]`."""

    def state_dict(self) -> dict[str, Any]:
        """The state of a buffer of all trajectories, whose oldest is in slot 0. Collective."""
        state = self.buffer.state_dict()
        oldest_first = (state["first"] + torch.arange(self.buffer.capacity)) % self.buffer.capacity

        def pooled(rows: Tensor) -> Tensor:
            return self.world.all_gather_rows(rows[oldest_first], self.places, self.capacity)

        live = state["live"] // self.own * self.count
        return self._moved(state, pooled) | {
            "geometry": self.buffer.geometry(self.capacity),
            "first": 0,
            "live": live,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's trajectories from the state of a buffer of all trajectories.

        Raises:
            ValueError: the state is from a buffer with other arguments, or not complete. Nothing is changed then.
        """
        expected = self.buffer.geometry(self.capacity)
        if state.get("geometry") != expected:
            raise ValueError(f"the state is from a buffer with {state.get('geometry')}; this buffer has {expected}")
        if missing := {"first", "live"} - state.keys():
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}")
        places = (state["first"] + self.places) % self.capacity
        here = {
            "geometry": self.buffer.geometry(self.buffer.capacity),
            "first": 0,
            "live": state["live"] // self.count * self.own,
        }
        self.buffer.load_state_dict(self._moved(state, lambda rows: rows[places.to(rows.device)]) | here)

    def _moved(self, state: dict[str, Any], move: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The tensors that `state` has, after `move`, which maps rows by slot to rows by slot."""
        moved = {name: move(state[name]) for name in self.buffer.saved_tensors() if name in state}
        if "reference" in state:
            moved["reference"] = {
                name: None if rows is None else move(rows.unflatten(0, (-1, self.buffer.kept))).flatten(0, 1)
                for name, rows in state["reference"].items()
            }
        return moved
