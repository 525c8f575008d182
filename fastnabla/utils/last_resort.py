"""Ends the process when a C function hangs while it holds the GIL, so that no Python thread can run.

Only faulthandler's thread can do that, because it does not need Python. There is a single one, so several owners of a
deadline share it: it waits for the earliest.
"""

import faulthandler
import threading
import time

SOONEST = 1e-3
"""Seconds until a deadline that has passed."""

_deadlines: dict[object, float] = {}
_lock = threading.Lock()


def arm(owner: object, seconds: float) -> None:
    """Unless `arm` or `disarm` is called again for `owner`, end the process in `seconds` with status 1 and every thread's
    traceback on stderr."""
    with _lock:
        _deadlines[owner] = time.monotonic() + seconds
        _wait_for_the_earliest()


def disarm(owner: object) -> None:
    """Remove the deadline of `owner`, if it has one."""
    with _lock:
        _deadlines.pop(owner, None)
        _wait_for_the_earliest()


def _wait_for_the_earliest() -> None:
    if not _deadlines:
        faulthandler.cancel_dump_traceback_later()
        return
    seconds = min(_deadlines.values()) - time.monotonic()
    faulthandler.dump_traceback_later(max(seconds, SOONEST), exit=True, file=2)
