"""Configuration errors that name the field, its value and the fix."""

from typing import Any


def require(condition: bool, field: str, value: Any, remedy: str) -> None:
    """Check a condition on a field.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"{field} = {value!r}: {remedy}")
