"""Progress of a command: bars on a terminal, plain lines where bars cannot be drawn, as in a log file."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastnabla.utils.console import print_plain

LINES = 10
"""Lines that `TaskProgress` prints where there is no bar."""


def draws_bars(console: Console) -> bool:
    """Whether bars can be drawn: the console is a terminal that can move its cursor. FORCE_COLOR does not make a file one."""
    return console.is_interactive and console.file.isatty()


def progress_bars(console: Console) -> Progress:
    """Bars with a description, a status, and the elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def clock(seconds: float) -> str:
    """A duration as hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class TaskProgress:
    """Progress of one task: a bar, or a line after each tenth of the task. Enter it to show it.

    Args:
        console: where it is shown.
        name: the task's.
        total: its steps.
        done: steps that are done already.
    """

    def __init__(self, console: Console, name: str, total: int, done: int = 0) -> None:
        self._console, self._name, self._total, self._first, self._done = console, name, total, done, done
        self._bars = progress_bars(console) if draws_bars(console) else None
        self._status, self._started = "", time.monotonic()

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task(escape(self._name), total=self._total, completed=self._done, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            if error is None:  # it may have taken fewer steps
                self._bars.update(self._task, completed=self._total)
            self._bars.stop()

    def advance(self, steps: int = 1, status: str | None = None) -> None:
        """Advance the task, and show a status beside it.

        Args:
            steps: that were done since the last call.
            status: None leaves it as it is.
        """
        before, self._done = self._done, self._done + steps
        self._status = self._status if status is None else status
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, status=self._status)
        elif self._done * LINES // self._total > before * LINES // self._total:
            print_plain(self._console, self._line())

    def _line(self) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / (self._done - self._first) * max(0, self._total - self._done)
        parts = [f"{self._done}/{self._total}", self._status, f"{clock(elapsed)} elapsed", f"{clock(left)} left"]
        return f"{self._name}: {', '.join(part for part in parts if part)}"
