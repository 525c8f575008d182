"""Rows of results, and how they are formatted as Markdown tables. Imports no torch."""

from typing import Any

Row = dict[str, Any]
Tables = dict[str, dict[str, Row]]
"""Rows by table and name; the latest row of a name."""


def fits_a_cell(value: Any) -> bool:
    """Whether a value can be shown in a table cell."""
    return value is not None and not isinstance(value, dict | list)


def number(value: float | None, form: str) -> str:
    """`value` in the format `form`, or a dash if it was not measured."""
    return "–" if value is None else format(value, form)


def markdown_table(header: tuple[str, ...], table: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *table)]
