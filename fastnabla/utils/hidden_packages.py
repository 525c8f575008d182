"""Hides optional packages, which other libraries import whenever they are installed."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden_packages(*names: str) -> Iterator[None]:
    """Within the context, the packages `names` appear not to be installed, except those that are imported already.

    None in `sys.modules` makes `import` raise ModuleNotFoundError and `importlib.util.find_spec` return None. A library
    imported within the context works without these packages from then on.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
