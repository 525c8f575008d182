"""Functions of the user's own, named in the configuration as ``path.to.module:function``."""

import importlib
import traceback
from collections.abc import Callable
from typing import Any


def is_path(text: str) -> bool:
    """Whether `text` is written ``path.to.module:function``."""
    module, _, function = text.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_function(path: str, field: str, use: str) -> Callable[..., Any]:
    """Import the function at ``path.to.module:function``.

    Args:
        path: for which `is_path` is true.
        field: of the configuration, for messages.
        use: what it must take and return, for messages.

    Raises:
        ValueError: the module cannot be imported, or has no such name, or it is not callable.
    """
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # the module's own code may raise anything
        raise ValueError(
            f"{field}: cannot import {path!r:.200} ({in_words(error)}). Run from the module's folder, or install it."
        ) from error
    function = getattr(imported, name, None)
    if function is None:
        raise ValueError(
            f"{field}: cannot import {path!r:.200}: the module has no {name!r}; write its name as in the file."
        )
    if not callable(function):
        raise ValueError(f"{field}: {path!r:.200} is not callable; it must {use}.")
    return function


def in_words(error: Exception) -> str:
    """Type and message of an error that was caught, and the file and line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    line = "" if place.filename.startswith("<") else f" in {place.filename}, line {place.lineno}"
    return f"{type(error).__name__}: {error!s:.300}{line}"
