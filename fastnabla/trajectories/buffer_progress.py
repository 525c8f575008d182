"""Which step of each trajectory in a buffer is recorded next.

Trajectories that are sampled together advance together. Such a group's slots are checked and copied to the device once;
after that, each step only counts up one number.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(slots=True)
class Group:
    """Slots of different trajectories that are at the same step."""

    slots: tuple[int, ...]
    where: Tensor
    """The slots on the buffer's device, `[B]` int64."""
    next: int
    """Step that is recorded next."""


class Progress:
    """How many steps of each trajectory are recorded.

    Args:
        appended: number of recorded steps by slot, int64 on the CPU; updated in place.
        num_steps: T.
        device: of the buffer.
        check_reserved: raises IndexError unless all given slots are reserved.
    """

    def __init__(
        self, appended: Tensor, num_steps: int, device: torch.device, check_reserved: Callable[[Tensor], None]
    ) -> None:
        self.appended, self.num_steps, self.device, self.check_reserved = appended, num_steps, device, check_reserved
        self._groups: dict[tuple[int, ...], Group] = {}

    def group(self, slots: Tensor, step: int) -> Group:
        """The group of the trajectories in `slots [B]`, whose step `step` is about to be recorded.

        Raises:
            IndexError: a slot is not reserved.
            ValueError: a slot is given twice, or `step` is not the next one of all.
        """
        key = tuple(slots.tolist())
        group = self._groups.get(key)
        if group is None or group.next != step:
            group = self._new_group(key, slots, step)
        return group

    def _new_group(self, key: tuple[int, ...], slots: Tensor, step: int) -> Group:
        self.check_reserved(slots)
        if len(set(key)) < len(key):
            raise ValueError(f"slots must be different, found {list(key)}")
        if bool((self.appended[slots] != step).any()) or not 0 <= step < self.num_steps:
            raise ValueError(
                f"step {step} is out of order: next is {self.appended[slots].tolist()} of {self.num_steps}"
            )
        self._groups = {other: group for other, group in self._groups.items() if set(other).isdisjoint(key)}
        # Does not wait for the device: CUDA copies ordinary host memory before the call returns.
        self._groups[key] = Group(key, slots.to(self.device, non_blocking=True, copy=True), step)
        return self._groups[key]

    def advance(self, group: Group) -> None:
        """Count a recorded step of the group."""
        group.next += 1
        self.appended.numpy()[list(group.slots)] = group.next
        if group.next == self.num_steps:
            self._groups.pop(group.slots, None)

    def forget(self, slots: Tensor) -> None:
        """Start the trajectories in `slots [n]` over."""
        self.appended[slots] = 0
        self._groups.clear()

    def complete(self, slots: Tensor) -> Tensor:
        """Whether all steps of the trajectories in `slots [n]` are recorded, `[n]` bool."""
        return self.appended[slots] == self.num_steps

    def reload(self) -> None:
        """Continue from `appended` after its numbers have been changed."""
        self._groups.clear()
