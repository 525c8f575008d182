"""Imports of large libraries without garbage collection."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Within the context nothing is collected, and what is in memory at its end is left out of every later collection.

    Modules live as long as the process, so collections while torch and diffusers are imported find nothing; without them a
    command starts and ends in four seconds instead of seven. A notebook, which has objects of its own, and a process that has
    torch already are left as they are.
    """
    if "torch" in sys.modules or "IPython" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
