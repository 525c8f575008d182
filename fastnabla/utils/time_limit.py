"""A limit to the time that a call may take, kept even where the call never comes back.

Three things end it, each where the one before it cannot. SIGALRM, in the main thread: Python code, and C code that waits
for a signal or lets one in (sleep, sockets, locks of Python), end with an exception. A thread: where Python has not got
back to the main thread, or the exception was swallowed, it ends the process. faulthandler: where a hanging C function does
not even let other threads run (it holds the GIL), a thread that needs no Python does that.
"""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator

GRACE = 10.0
"""Seconds between one means and the next."""
STATUS = 1
"""Exit status of a process that has to be ended."""


class Expired(BaseException):
    """Raised within the call. No Exception, lest code that catches those and tries again goes on."""


@contextlib.contextmanager
def time_limit(seconds: float | None, error: Exception, grace: float = GRACE) -> Iterator[None]:
    """Let what is within take `seconds` at most, by the clock; None for no limit.

    Work that was only handed to a GPU is not waited for, and does not count. Only one limit at a time: what is within must
    have none of its own, nor use SIGALRM or `faulthandler.dump_traceback_later`.

    Args:
        seconds: the limit.
        error: raised if the limit is passed; its cause has the traceback of where the time went. If that cannot be done,
            `grace` seconds later the process ends with `STATUS`, having written it and all threads' tracebacks to stderr; if
            not even that, as much later with the tracebacks alone.
        grace: seconds.
    """
    if seconds is None:
        yield
        return
    in_main = threading.current_thread() is threading.main_thread()
    over = False

    def expire(*_: object) -> None:
        if not over:
            raise Expired

    ender = threading.Timer(seconds + grace, _end, (str(error),))
    ender.daemon = True
    before = signal.signal(signal.SIGALRM, expire) if in_main else None
    try:
        ender.start()
        faulthandler.dump_traceback_later(seconds + 2 * grace, exit=True, file=2)
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            over = True
    except Expired as expired:
        raise error from expired
    finally:  # the alarm rings once: not here any more
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        ender.cancel()
        faulthandler.cancel_dump_traceback_later()


def _end(message: str) -> None:
    """End the process, without waiting for anything that hangs."""
    faulthandler.dump_traceback(file=2)
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar may have hidden it
    os.write(2, f"{show_cursor}error: {message}\n".encode(errors="replace"))
    os._exit(STATUS)
