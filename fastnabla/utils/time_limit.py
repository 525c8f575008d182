"""A time limit for a call that is enforced even if the call never returns.

There are three mechanisms, each for when the previous one fails:

1. SIGALRM, in the main thread, raises an exception. It interrupts Python code, and C code that handles signals (sleep,
   sockets, Python's locks).
2. If the main thread does not return to Python, or the exception was swallowed, a timer thread ends the process.
3. If a C function hangs while holding the GIL, no Python thread can run. `fastnabla.utils.last_resort` then ends the
   process.

In another thread than the main one, only the last two are available. Autograd's thread for a GPU is such a thread.
"""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

from fastnabla.utils.last_resort import arm, disarm

GRACE = 10.0
"""Seconds between one mechanism and the next."""
STATUS = 1
"""Exit status of a process that is ended."""


class Expired(BaseException):
    """Raised within the call. Not an Exception, because code that catches those and retries would go on."""


@contextlib.contextmanager
def time_limit(seconds: float | None, error: Exception, grace: float = GRACE) -> Iterator[None]:
    """Limit the wall-clock time of the block within the context.

    Work queued on a GPU is not waited for, so it does not count; see `fastnabla.utils.queued_work`. Limits cannot be nested,
    and the block must not use SIGALRM or `faulthandler.dump_traceback_later`.

    Args:
        seconds: the limit; None for none.
        error: raised when the limit is exceeded; its cause has the traceback of the interrupted code. If the exception cannot
            be raised, the process ends `grace` seconds later with `STATUS`, and prints `error` and all threads' tracebacks to
            stderr. If that fails too, it ends after another `grace` seconds and prints only the tracebacks.
        grace: seconds between one mechanism and the next.
    """
    if seconds is None:
        yield
        return
    in_main = threading.current_thread() is threading.main_thread()
    over = False

    def expire(*_: object) -> None:
        if not over:
            raise Expired

    timer = threading.Timer(seconds + grace, end_process, (str(error),))
    timer.daemon = True
    before = signal.signal(signal.SIGALRM, expire) if in_main else None
    try:
        timer.start()
        arm(timer, seconds + 2 * grace)
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            over = True
    except Expired as expired:
        raise error from expired
    finally:  # the alarm fires at most once, so it cannot interrupt this block
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        timer.cancel()
        disarm(timer)


def end_process(message: str) -> NoReturn:
    """End the process with `STATUS`, without waiting for anything that hangs. Prints every thread's traceback and `message`."""
    print_tracebacks(message)
    os._exit(STATUS)


def print_tracebacks(message: str) -> None:
    """Print every thread's traceback and the error `message` to stderr, whatever the other threads hold."""
    faulthandler.dump_traceback(file=2)
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar may have hidden it
    os.write(2, f"{show_cursor}error: {message}\n".encode(errors="replace"))
