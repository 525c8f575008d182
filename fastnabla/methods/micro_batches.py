"""How a batch of transitions is cut into micro-batches, and which network passes their rows share.

A transition needs the policy at its state x and at its next state x'. If the micro-batch also holds the transition that
starts in x', that row's pass serves both. Step numbers on the host decide all of this.
"""

import dataclasses
import math

import torch
from torch import Tensor

from fastnabla.methods.accumulation import Part
from fastnabla.trajectories.transitions import LazyTransitions, Transitions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch(Part):
    """n transitions that go through the networks together: all "inner" or all "last", with or without a reverse residual."""

    selection: LazyTransitions
    """The n transitions, not yet gathered."""
    next_row: Tensor
    """`[n]` int64 on the host: the row whose state is row i's next state; -1 if there is none, or passes are not shared."""
    has_reverse: bool
    """Whether the transitions are drawn for a reverse residual. Last ones have none."""

    @property
    def last(self) -> bool:
        """Whether the transitions end their trajectories."""
        return self.kind == "last"

    @property
    def pass_rows(self) -> tuple[int, int]:
        """Rows of the passes at x, and of those at x'. Finished samples need none."""
        return len(self.rows), 0 if self.last else len(self.unshared)

    @property
    def unshared(self) -> Tensor:
        """Rows whose next state is not the state of another row, `[u]`."""
        return torch.where(self.next_row < 0)[0]

    @property
    def shared(self) -> Tensor:
        """Rows whose state is the next state of another row, `[n − u]`, in no particular order."""
        return self.next_row[self.next_row >= 0]

    def next_state_index(self) -> Tensor:
        """`[n]` indices of the rows' next states into the values of all n rows followed by those of `unshared`."""
        place = len(self.rows) + (self.next_row < 0).cumsum(0) - 1
        return torch.where(self.next_row < 0, place, self.next_row)

    def gather(self) -> Transitions:
        """The transitions, on the device."""
        return self.selection.gather(torch.arange(len(self.rows)))


def cut(
    selection: LazyTransitions, num_steps: int, rows: Tensor, size: int, *, reuse_passes: bool = False
) -> list[MicroBatch]:
    """Micro-batches of at most `size` transitions. Those of the same kind have sizes as equal as possible.

    Args:
        selection: transitions of trajectories of `num_steps` steps.
        num_steps: T.
        rows: positions `[m]` in the selection of the transitions to cut.
        size: maximum number of transitions in one network pass.
        reuse_passes: put transitions of a trajectory together, in order, and let neighbours share passes.
    """
    is_last = selection.step_index[rows] == num_steps - 1
    inner, last = rows[~is_last], rows[is_last]
    if reuse_passes:
        position = selection.trajectory * num_steps + selection.step_index
        inner = inner[position[inner].argsort(stable=True)]
    factor = selection.reverse_factor
    drawn = torch.ones(len(inner), dtype=torch.bool) if factor is None else factor[inner] > 0
    return [
        MicroBatch(
            rows=part,
            kind=kind,
            selection=selection[part],
            next_row=_next_row(selection[part], reuse_passes),
            has_reverse=has_reverse,
        )
        for kind, of, has_reverse in (
            ("inner", inner[drawn], True),
            ("inner", inner[~drawn], False),
            ("last", last, False),
        )
        for part in _even(of, size)
    ]


def _even(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return rows.tensor_split(math.ceil(len(rows) / size)) if len(rows) else ()


def _next_row(part: LazyTransitions, reuse_passes: bool) -> Tensor:
    next_row = torch.full((len(part),), -1)
    if reuse_passes and len(part) > 1:
        adjacent = (part.trajectory[1:] == part.trajectory[:-1]) & (part.step_index[1:] == part.step_index[:-1] + 1)
        next_row[:-1] = torch.where(adjacent, torch.arange(1, len(part)), -1)
    return next_row
