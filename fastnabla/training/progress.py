"""Progress of a run on the terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console

from fastnabla.models.compiling import compile_cost
from fastnabla.utils.console import progress_bar


class ProgressDisplay:
    """Two bars: the run's updates, and the steps of the current phase. Enter it to show them.

    Args:
        console: where they are drawn.
        updates: of the whole run.
        done: updates that are done already.
    """

    def __init__(self, console: Console, updates: int, done: int) -> None:
        self._bars = progress_bar(console)
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

    def show_update(self, done: int, reward: float) -> None:
        """Show the number of updates done, the rollout's mean reward, and the cost of compiling so far."""
        status, cost = f"reward {reward:.3f}", compile_cost()
        if cost.graphs:
            status += f"; {cost.graphs} graphs compiled in {cost.seconds:.0f} s"
        self._bars.update(self._updates, completed=done, status=status)

    def show_status(self, status: str) -> None:
        """Show a status beside the updates."""
        self._bars.update(self._updates, status=status)
