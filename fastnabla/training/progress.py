"""Progress of a run: two bars on a terminal, a line per update where bars cannot be drawn, as in a log file."""

import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from fastnabla.models.compiling import compile_cost
from fastnabla.utils.console import print_plain
from fastnabla.utils.progress import clock, draws_bars, progress_bars

WINDOW = 20
"""Number of the last updates whose time predicts the others'."""
PHASES_OF_AN_UPDATE = ("rollout", "step")


class ProgressBars:
    """Two bars: the run's updates, and the steps of the current phase. Enter it to show them.

    Args:
        console: where they are drawn.
        updates: of the whole run.
        done: updates that are done already.
    """

    def __init__(self, console: Console, updates: int, done: int) -> None:
        self._bars = progress_bars(console)
        self._updates = self._bars.add_task("updates", total=updates, completed=done, status="")
        self._phase = self._bars.add_task("", total=1, status="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, phase: str, total: int) -> None:
        """Show a new phase of `total` steps."""
        self._bars.reset(self._phase, description=phase, total=total)

    def advance(self, steps: int = 1) -> None:
        """Advance the phase."""
        self._bars.advance(self._phase, steps)

    def show_update(self, done: int, metrics: dict[str, Any]) -> None:
        """Show the number of updates done, the rollout's mean reward, and the cost of compiling so far.

        Args:
            done: updates done.
            metrics: the update's, by name.
        """
        status = "; ".join(filter(None, (f"reward {metrics['rollout_reward']:.3f}", _compiled())))
        self._bars.update(self._updates, completed=done, status=status)

    def show_evaluation(self, done: int, reward: str) -> None:
        """Show an evaluation's mean reward after `done` updates."""
        self._bars.update(self._updates, status=f"evaluated reward {reward}")


class ProgressLines:
    """The same as lines of plain text, one per update.

    Args:
        console, updates, done: see `ProgressBars`.
    """

    def __init__(self, console: Console, updates: int, done: int) -> None:
        self._console, self._updates, self._done = console, updates, done
        self._times: deque[float] = deque(maxlen=WINDOW + 1)
        """When the last updates ended; first, when the first one began."""
        self._compiled = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def begin(self, phase: str, total: int) -> None:
        """Print the name of a new phase, unless it is part of an update."""
        if phase not in PHASES_OF_AN_UPDATE:
            print_plain(self._console, phase)
        elif not self._times:
            self._times.append(time.monotonic())

    def advance(self, steps: int = 1) -> None:
        """Steps of a phase are not shown."""

    def show_update(self, done: int, metrics: dict[str, Any]) -> None:
        """Print the update's reward and loss, the mean time of the last updates, with their rollouts and evaluations, and the
        time that is left.

        Args:
            done, metrics: see `ProgressBars.show_update`.
        """
        self._times.append(time.monotonic())
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        parts = [f"reward {metrics['rollout_reward']:.3f}", f"loss {metrics['loss']:.4g}"]
        if metrics["skipped"]:
            parts.append("skipped")
        parts.append(f"{seconds:.{1 if seconds >= 1 else 3}f} s/update")
        parts.append(f"{clock(seconds * (self._updates - done))} left")
        if self._compiled != _compiled():
            self._compiled = _compiled()
            parts.append(self._compiled)
        print_plain(self._console, f"update {done}/{self._updates}: {', '.join(parts)}")

    def show_evaluation(self, done: int, reward: str) -> None:
        """Print an evaluation's mean reward after `done` updates."""
        print_plain(self._console, f"evaluation after {done} updates: reward {reward}")


def progress_display(console: Console, updates: int, done: int) -> ProgressBars | ProgressLines:
    """Bars if they can be drawn on the console, otherwise lines. See `ProgressBars` for the arguments."""
    return (ProgressBars if draws_bars(console) else ProgressLines)(console, updates, done)


def _compiled() -> str:
    """The cost of compiling so far; empty if nothing was compiled."""
    cost = compile_cost()
    return f"{cost.graphs} graphs compiled in {cost.seconds:.0f} s" if cost.graphs else ""
