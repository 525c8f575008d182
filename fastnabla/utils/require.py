"""Errors of configurations name the field, its value and a remedy."""

from typing import Any


def require(condition: bool, field: str, value: Any, remedy: str) -> None:
    """Check one field.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"{field} = {value!r}: {remedy}")
