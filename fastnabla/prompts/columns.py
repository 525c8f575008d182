"""Which column of a table, or field of JSON objects, has the prompts."""

from collections.abc import Iterable

WITHOUT = "leave prompts.column out. FILE:COLUMN chooses the column of one source."
"""Remedy for a column of prompts that have none."""


def is_default(name: str) -> bool:
    """Whether a column of this name has the prompts unless another is chosen."""
    return name.strip().lower() in ("prompt", "prompts")


def column_of(names: Iterable[str], column: str | None) -> str:
    """The column with the prompts.

    Args:
        names: the columns that exist.
        column: the chosen one. None: the one called prompt or prompts, in any case.

    Raises:
        ValueError: there is no such column, or several are called prompt or prompts.
    """
    names = list(dict.fromkeys(names))
    if column is not None:
        if column not in names:
            raise ValueError(f"no column or field {column!r}; use one of {listed(names)}.")
        return column
    found = [name for name in names if is_default(name)]
    if len(found) > 1:
        raise ValueError(f"has several columns of prompts; choose one of {listed(found)} with prompts.column.")
    if not found:
        raise ValueError(
            f"no column or field is called prompt or prompts; choose one of {listed(names)} with prompts.column."
        )
    return found[0]


def listed(names: Iterable[str]) -> str:
    """The names in quotes, for messages; long names and lists are cut. "none" of no names."""
    names = list(names)
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(repr(name if len(name) <= 60 else f"{name[:60]}…") for name in names[:20]) or "none") + rest
