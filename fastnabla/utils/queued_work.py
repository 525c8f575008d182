"""A time limit for work that is queued on a GPU and that the host does not wait for.

An event is recorded before the launches and one after them. A thread polls the events, so nothing waits for the device. The
time counts from when the thread sees the first event complete, so work that was queued before does not count.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from fastnabla.utils.time_limit import end_process

PAUSE = 1.0
"""Most seconds between two polls."""
POLLS = 20
"""Fewest polls within a limit."""


class Event(Protocol):
    """A place in a device's queue, such as a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the work before it is complete. Does not wait."""


class Work(NamedTuple):
    """Work between two events."""

    first: Event
    last: Event
    seconds: float
    message: str


class QueuedWork:
    """Watches queued work, in its order.

    Args:
        expired: called in the watching thread with the message of work that is not complete in time.
    """

    def __init__(self, expired: Callable[[str], object] = end_process) -> None:
        self.expired = expired
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._polling = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limit(self, seconds: float | None, message: str, device: torch.device) -> Iterator[None]:
        """Limit the time of the work that the block queues on the current stream of `device`. If it takes longer, the process
        ends with status 1, `message` and every thread's traceback. Never waits for the device.

        No event is polled within the block, which may thus capture a CUDA graph.

        Args:
            seconds: the limit; None for none.
            message: the error.
            device: nothing is queued on a CPU.
        """
        if seconds is None or device.type != "cuda":
            yield
            return
        with self._polling:
            first = record(device)
            yield
            last = record(device)
        self.watch(first, last, seconds, message)

    def watch(self, first: Event, last: Event, seconds: float, message: str) -> None:
        """Watch the work between two events; see `limit`."""
        self._queue.put(Work(first, last, seconds, message))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="queued work", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            # After an error of the device every query raises. The host meets the same error.
            with contextlib.suppress(RuntimeError):
                self._complete(work)

    def _complete(self, work: Work) -> None:
        """Wait until the work is complete or its time is over."""
        pause = min(PAUSE, work.seconds / POLLS)
        while not self._is_complete(work.first):
            time.sleep(pause)
        until = time.monotonic() + work.seconds
        while not self._is_complete(work.last):
            if time.monotonic() > until:
                self.expired(work.message)
                return
            time.sleep(pause)

    def _is_complete(self, event: Event) -> bool:
        with self._polling:
            return event.query()


def record(device: torch.device) -> Event:
    """An event after everything that is queued on the current stream of `device`, a GPU."""
    return torch.cuda.current_stream(device).record_event()


QUEUED = QueuedWork()
"""Watches this process's work."""
