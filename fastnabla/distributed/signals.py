"""Signals that stop a run gracefully: it finishes its update, saves a checkpoint and exits.

Users and schedulers send SIGTERM or SIGINT (Ctrl-C). SLURM sends SIGUSR1 before a time limit, with
``#SBATCH --signal=USR1@120``. A second SIGINT stops the run immediately.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

from fastnabla.distributed.world import ALONE, World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """Raised when a signal asked the run to stop."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received

    @property
    def status(self) -> int:
        """The conventional exit status: 128 plus the signal number."""
        return 128 + self.received


class StopSignals:
    """A context in which `SIGNALS` do not end the process but make `check` raise.

    Enter it in the main thread, where Python allows signal handlers. If it is never entered, `check` never raises.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._before = {}

    def check(self, world: World = ALONE) -> None:
        """Call this where the run can stop. Collective: if any rank received a signal, all ranks stop.

        Raises:
            Stopped: a signal was received.
        """
        if number := world.max(self.received or 0):
            self.received = signal.Signals(number)
        if self.received is not None:
            raise Stopped(self.received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
