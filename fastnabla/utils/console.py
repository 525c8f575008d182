"""Terminal output of the command lines."""

import contextlib
import logging
import os
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fastnabla.utils.printable import printable


def quiet_libraries() -> None:
    """Suppress the libraries' start-up messages. Call this before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextlib.contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """Within the context, nothing is written to stdout or stderr if `silent`. Used for all ranks but the first."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def print_error(error: Exception | str) -> None:
    """Print a user error on stderr, without a traceback."""
    console = Console(stderr=True)
    console.print("[bold red]error[/]: ", end="")
    print_plain(console, str(error))


def print_plain(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` literally: markup and emoji codes are not interpreted, control characters are escaped."""
    console.print(Text(printable(text)), style=style, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A progress bar with the phase, a status, and the elapsed and remaining time."""
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
