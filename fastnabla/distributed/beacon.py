"""`BEACON` shows that this process's main thread makes progress, so that other threads can find that it hangs.

A step is a network pass, a chunk of images that is decoded, rewarded or measured, or a collective operation. Some phases are
excused, because they may take long without a step.
"""

import contextlib
from collections.abc import Iterator


class Beacon:
    """Counts the main thread's steps and its collective operations."""

    def __init__(self) -> None:
        self.steps = 0
        self.collectives = 0
        """Collective operations that the main thread has entered. All ranks enter the same ones in the same order, so a rank
        that has entered fewer is behind."""
        self._excused = 0

    @property
    def progress(self) -> tuple[int, int] | None:
        """A value that differs after every step; None in an excused phase."""
        return None if self._excused else (self.steps, self.collectives)

    def advance(self) -> None:
        """Count a step."""
        self.steps += 1

    def begin_excused(self) -> None:
        """Begin a phase that may take long without a step. Phases may be nested."""
        self._excused += 1

    def end_excused(self) -> None:
        """End the phase begun last."""
        self.steps += 1
        self._excused -= 1

    @contextlib.contextmanager
    def excused(self) -> Iterator[None]:
        """A context that is an excused phase."""
        self.begin_excused()
        try:
            yield
        finally:
            self.end_excused()

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """A context that is a collective operation: this rank may wait in it for the others."""
        self.collectives += 1
        with self.excused():
            yield


BEACON = Beacon()
