"""Progress of a run where bars cannot be drawn: a plain line per update."""

import io
import re

import pytest
from rich.console import Console

from fastnabla.models.compiling import CompileCost
from fastnabla.training import progress
from fastnabla.training.progress import ProgressBars, ProgressLines, progress_display
from fastnabla.utils.progress import TaskProgress, clock, draws_bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {"rollout_reward": 0.5, "loss": 12.0, "skipped": 0}
ESCAPES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
FILES = {"log": {}, "narrow": {"COLUMNS": "20"}, "forced colours": {"FORCE_COLOR": "1"}, "dumb": {"TERM": "dumb"}}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock, which the test sets. Nothing has been compiled, whatever ran before in this process."""
    now = [0.0]
    monkeypatch.setattr(progress, "compile_cost", lambda: CompileCost(graphs=0, seconds=0.0))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("environment", FILES.values(), ids=FILES)
def test_a_log_has_a_line_per_update(environment: dict[str, str], seconds: list[float]) -> None:
    file = Terminal() if "TERM" in environment else io.StringIO()
    console = Console(file=file, _environ=environment)
    with progress_display(console, updates=100, done=4) as shown:
        assert isinstance(shown, ProgressLines)
        shown.begin("pretrained samples", 10)
        seconds[0] = 1000.0  # not counted
        for done, metrics in ((5, METRICS), (6, METRICS | {"loss": float("nan"), "skipped": 1})):
            shown.begin("rollout", 8)
            shown.advance(2)
            shown.begin("step", 1)
            shown.advance()
            seconds[0] += 2.0
            shown.show_update(done, metrics)
        shown.begin("evaluation", 10)
        shown.show_evaluation(6, "0.7500")
    assert file.getvalue().splitlines() == [
        "pretrained samples",
        "update 5/100: reward 0.500, loss 12, 2.0 s/update, 0:03:10 left",
        "update 6/100: reward 0.500, loss nan, skipped, 2.0 s/update, 0:03:08 left",
        "evaluation",
        "evaluation after 6 updates: reward 0.7500",
    ]
    assert not ESCAPES.search(file.getvalue())


def test_the_time_left_follows_the_last_updates(seconds: list[float]) -> None:
    file = io.StringIO()
    with progress_display(Console(file=file), updates=100, done=0) as shown:
        shown.begin("rollout", 1)
        for done in range(1, 51):
            seconds[0] += 60.0 if done == 1 else 0.01  # the first one compiles
            shown.show_update(done, METRICS)
    lines = file.getvalue().splitlines()
    assert "60.0 s/update, 1:39:00 left" in lines[0]
    assert "0.010 s/update, 0:00:00 left" in lines[-1]


def test_bars_only_on_terminals() -> None:
    terminal = Console(file=Terminal(), _environ={"TERM": "xterm"})
    assert draws_bars(terminal) and not draws_bars(Console(file=io.StringIO(), force_terminal=True))
    with progress_display(terminal, updates=2, done=0) as shown:
        assert isinstance(shown, ProgressBars)
        shown.begin("rollout", 4)
        shown.advance(4)
        shown.show_update(1, METRICS)
        shown.show_evaluation(1, "0.5")
    assert "updates" in terminal.file.getvalue()


def test_a_task_has_a_line_for_each_tenth(seconds: list[float]) -> None:
    file = io.StringIO()
    with TaskProgress(Console(file=file), "[run]", total=200, done=100) as task:
        for step in range(100):
            seconds[0] += 1.0
            task.advance(status=f"loss {step}" if step % 10 == 0 else None)
    lines = file.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "[run]: 120/200, loss 10, 0:00:20 elapsed, 0:01:20 left"
    assert lines[-1] == "[run]: 200/200, loss 90, 0:01:40 elapsed, 0:00:00 left"
    terminal = Terminal()
    with TaskProgress(Console(file=terminal, _environ={"TERM": "xterm"}), "[run]", total=10) as task:
        task.advance(4)
    assert "[run]" in terminal.getvalue() and "10/10" in terminal.getvalue()


def test_durations() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]
