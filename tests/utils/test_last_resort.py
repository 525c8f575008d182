"""Several deadlines share faulthandler's single timer."""

import faulthandler

import pytest

from fastnabla.utils import last_resort


def test_the_timer_waits_for_the_earliest_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timer = [0.0], []
    monkeypatch.setattr(last_resort.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit, file: timer.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timer.append(None))
    last_resort.arm("rank", 30.0)
    last_resort.arm("reward", 100.0)
    clock[0] = 20.0
    last_resort.arm("rank", 30.0)
    clock[0] = 49.0
    last_resort.arm("reward", 60.0)
    last_resort.disarm("rank")
    clock[0] = 120.0
    last_resort.arm("rank", 30.0)  # the reward's deadline is over
    last_resort.disarm("reward")
    last_resort.disarm("rank")
    last_resort.disarm("rank")
    assert timer == [30, 30, 30, 1, 60, last_resort.SOONEST, 30, None, None]
