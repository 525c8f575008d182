"""Imports of large libraries without garbage collection."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Within the context nothing is collected, and what it has imported is left out of every later collection.

    Modules live as long as the process, so collections while torch and diffusers are imported find nothing, and take two of
    the seven seconds that a command needs to start and end. A process that has torch already is left as it is.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
