"""Terminal output of the command lines."""

import contextlib
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from fastnabla.utils.printable import printable
from fastnabla.utils.secrets import without_secrets


def quiet_libraries() -> None:
    """Suppress the libraries' start-up messages, and make matplotlib draw to files. Call this before importing them.

    Commands that a notebook starts inherit its MPLBACKEND, and matplotlib cannot be imported with the name of a backend that
    is not installed. In the notebook's own process the variable is left alone.
    """
    if "IPython" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def command_console() -> Console:
    """The console of a command line.

    Characters that the output's encoding lacks are escaped instead of ending the command, and every line is flushed, also to
    a log file. Warnings, and the traceback of an error that nobody catches, are printed without secrets. TensorBoard's writer
    raises its errors again where something is logged, so the first time they are not printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.excepthook = lambda kind, error, where: print_traceback(error)
    threading.excepthook = _thread_failed
    if logging.lastResort:  # prints what is logged where no handler is set up
        logging.lastResort.addFilter(_hide_secrets)
    return Console()


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    raised_again = type(failure.thread).__module__ == "tensorboard.summary.writer.event_file_writer"
    if failure.exc_value and not raised_again and failure.exc_type is not SystemExit:
        print_traceback(failure.exc_value)


def _hide_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_secrets(record.getMessage()), None
    return True


@contextlib.contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """Within the context, nothing is written to stdout or stderr if `silent`. Used for all ranks but the first."""
    if not silent:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def print_error(error: Exception | str) -> None:
    """Print a user error on stderr, without a traceback."""
    console = Console(stderr=True)
    console.print("[bold red]error[/]: ", end="")
    print_plain(console, str(error))


def print_traceback(error: BaseException) -> None:
    """Print the traceback of `error` on stderr."""
    print_plain(Console(stderr=True), "".join(traceback.format_exception(error)).rstrip("\n"))


def print_plain(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` literally and without secrets: markup and emoji codes are not interpreted, control characters are escaped."""
    console.print(Text(printable(without_secrets(text))), style=style, soft_wrap=True)
