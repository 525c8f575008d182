"""What the readers of prompt sources return."""

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for an entry that cannot be read."""

    reason: str


Entries = Iterable[tuple[str, Any]]
"""Pairs (place, value). The place is a position in the source, for messages. The value is a prompt if it is text; any other
value, including `Unreadable`, is a bad line."""
