"""Configuration errors that name the field, its value and the fix."""

import math
from typing import Any


def require(condition: bool, field: str, value: Any, remedy: str) -> None:
    """Check a condition on a field.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"{field} = {value!r}: {remedy}")


def require_positive(section: str, config: Any, *names: str) -> None:
    """Check that the fields `names` of `config`, the section called `section`, are positive and finite.

    Raises:
        ValueError: one of them is not.
    """
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{section}.{name}", value, "must be positive and finite.")
