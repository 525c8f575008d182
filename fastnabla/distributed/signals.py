"""Signals that ask a run to stop: it finishes its update, saves a checkpoint and exits.

SIGTERM and SIGINT (Ctrl-C) are what people and schedulers send; SIGUSR1 is what SLURM sends before a time limit, with
``#SBATCH --signal=USR1@120``. A second SIGINT stops at once.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

from fastnabla.distributed.world import ALONE, World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A run was asked to stop, and has."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received

    @property
    def status(self) -> int:
        """The conventional exit status, 128 and the signal's number."""
        return 128 + self.received


class StopSignals:
    """While it is entered, `SIGNALS` no longer end the process, but make `check` raise.

    Enter it in the main thread, as Python has it for signals. One that is never entered lets everything go on.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._before = {}

    def check(self, world: World = ALONE) -> None:
        """Call it where the run can stop; with `world`, where all its ranks do, and all stop if one was asked to.

        Raises:
            Stopped: it was asked to.
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
