"""How a batch of transitions is cut into micro-batches, and which network passes their rows share.

A transition needs the policy at its state x and at its next state x'. Where a micro-batch holds the transition that
starts in x' too, that one's pass serves both. All of this is decided on the host, from step numbers alone.
"""

import dataclasses
import math

import torch
from torch import Tensor

from fastnabla.trajectories.transitions import LazyTransitions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """n transitions that go through the networks together: all inner ones or all last ones."""

    rows: Tensor
    """Their positions in the selection, `[n]` int64."""
    last: bool
    """Whether they end their trajectories."""
    followed_by: Tensor
    """`[n]` int64: the row that starts in the state where row i ends, if passes are shared and it is here; else -1."""

    @property
    def kind(self) -> str:
        """What its rows are counted as."""
        return "last" if self.last else "inner"

    @property
    def pass_rows(self) -> tuple[int, int]:
        """Rows of passes at x, and at x', where finished samples need none."""
        return len(self.rows), 0 if self.last else len(self.tails)

    @property
    def tails(self) -> Tensor:
        """Rows whose next state is no other row's state, `[t]`."""
        return torch.where(self.followed_by < 0)[0]

    @property
    def followers(self) -> Tensor:
        """Rows that start where another ends, `[s]` with s = n − t, in no order."""
        return self.followed_by[self.followed_by >= 0]

    def of(self, rows: Tensor) -> "MicroBatch":
        """The same micro-batch, cut from a selection that is itself the part `rows` of another."""
        return dataclasses.replace(self, rows=rows[self.rows])

    def after(self) -> Tensor:
        """Where to find what belongs to each row's next state in values of all rows followed by values of the tails,
        `[n]` numbers below n + t."""
        place = len(self.rows) + (self.followed_by < 0).cumsum(0) - 1
        return torch.where(self.followed_by < 0, place, self.followed_by)


def cut(selection: LazyTransitions, num_steps: int, size: int, share: bool) -> list[MicroBatch]:
    """Micro-batches of at most `size` transitions, as even as can be, over all of `selection`.

    Args:
        selection: transitions of trajectories of `num_steps` steps.
        num_steps: T.
        size: most transitions in one network pass.
        share: put transitions of a trajectory together, in order, and let neighbours share passes.
    """
    is_last = selection.step_index == num_steps - 1
    inner, last = torch.where(~is_last)[0], torch.where(is_last)[0]
    if share:
        position = selection.trajectory * num_steps + selection.step_index
        inner = inner[position[inner].argsort(stable=True)]
    parts = [(rows, False) for rows in _even(inner, size)] + [(rows, True) for rows in _even(last, size)]
    return [
        MicroBatch(rows=rows, last=is_last, followed_by=_followed_by(selection, rows, share)) for rows, is_last in parts
    ]


def _even(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return rows.tensor_split(math.ceil(len(rows) / size)) if len(rows) else ()


def _followed_by(selection: LazyTransitions, rows: Tensor, share: bool) -> Tensor:
    none = torch.full((len(rows),), -1)
    if not share or len(rows) < 2:
        return none
    trajectory, step = selection.trajectory[rows], selection.step_index[rows]
    follows = (trajectory[1:] == trajectory[:-1]) & (step[1:] == step[:-1] + 1)
    none[:-1] = torch.where(follows, torch.arange(1, len(rows)), -1)
    return none
