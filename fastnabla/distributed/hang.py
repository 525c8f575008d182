"""Decides whether this process's main thread hangs, rather than waits for another rank.

Whoever makes no progress and is not excused (`fastnabla.distributed.beacon`) hangs, with one exception. A collective operation
on GPUs returns at once, and the host waits later, when it reads a result. Such a rank has entered more collective operations
than the one that it waits for, which is the one that hangs.
"""

import sys
import threading
from collections.abc import Callable, Iterable

from fastnabla.distributed.beacon import Beacon

AGAIN = 0.1
"""When to decide again about a rank that waits for another, as a fraction of the limit."""


class HangLimit:
    """A limit on the time without progress.

    Args:
        seconds: the limit.
        beacon: shows the main thread's progress.
    """

    def __init__(self, seconds: float, beacon: Beacon) -> None:
        self.seconds, self.beacon = seconds, beacon
        self._progress: tuple[int, int] | None = None
        self._still = 0.0

    def is_exceeded(self, passed: float, others: Callable[[], Iterable[int]]) -> bool:
        """Whether the main thread hangs.

        Args:
            passed: seconds since the last call. A process that is suspended calls nothing, so that time does not count.
            others: returns the collective operations that each of the other ranks has entered. Only called if there was no
                progress.
        """
        before, self._progress = self._progress, self.beacon.progress
        self._still = 0.0 if before is None or before != self._progress else self._still + passed
        if self._still <= self.seconds:
            return False
        if any(entered < self.beacon.collectives for entered in others()):
            self._still -= AGAIN * self.seconds
            return False
        return True


def main_thread_place() -> str:
    """Where the main thread is: file, line and function."""
    frame = sys._current_frames()[threading.main_thread().ident]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
