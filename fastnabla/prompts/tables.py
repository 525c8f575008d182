"""Prompts in a column of a table: CSV or TSV, whose first line names the columns."""

import csv
import io
import re
from collections.abc import Iterator

from fastnabla.prompts.columns import WITHOUT, column_of
from fastnabla.prompts.entries import Entries, Unreadable

SUFFIXES = (".csv", ".tsv")
Row = list[str] | Unreadable
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def read_table(text: str, suffix: str, column: str | None) -> Entries:
    """Read the prompts of a table. Blank lines are skipped.

    The separator is the comma, semicolon, tab or bar under which the first line has the column.

    Args:
        text: the file's text, with \\n as line ending.
        suffix: the file's, in lower case.
        column: see `column_of`.

    Raises:
        ValueError: the first line has no such column, or several.
    """
    headers = {separator: _header(text, separator) for separator in ("\t,;|" if suffix == ".tsv" else ",;\t|")}
    separator = next((s for s, names in headers.items() if _has(names, column)), None)
    if separator is None:
        try:
            column_of(max(headers.values(), key=len), column)
        except ValueError as error:
            remedy = "rename the file to .txt." if suffix in SUFFIXES else WITHOUT
            raise ValueError(
                f"{error} The first line of a table must name its columns; if every line is a prompt, {remedy}"
            ) from error
    names = headers[separator]
    name, width = column_of(names, column), len(names)
    if names.count(name) > 1:
        raise ValueError(f"has {names.count(name)} columns called {name!r}; rename all but the one with the prompts.")
    index = names.index(name)
    rows = _rows(text, separator)
    next(rows)
    return ((place, _cell(row, index, width, separator)) for place, row in rows)


def _header(text: str, separator: str) -> list[str]:
    _, row = next(_rows(text, separator), ("", []))
    names = [] if isinstance(row, Unreadable) else [name.strip() for name in row]
    while names and not names[-1]:
        names.pop()
    return names


def _has(names: list[str], column: str | None) -> bool:
    try:
        return bool(column_of(names, column))
    except ValueError:
        return False


def _cell(row: Row, index: int, width: int, separator: str) -> str | Unreadable:
    if isinstance(row, Unreadable):
        return row
    while len(row) > width and not row[-1].strip():
        row.pop()
    if len(row) != width:
        return Unreadable(
            f"has {len(row)} cells, but the first line has {width}; put quotes around a cell that contains {separator!r}."
        )
    return row[index]


def _rows(text: str, separator: str) -> Iterator[tuple[str, Row]]:
    """Rows that are not blank, each with its place."""
    for place, row in _tab_separated(text) if separator == "\t" else _quoted(text, separator):
        if isinstance(row, Unreadable) or any(cell.strip() for cell in row):
            yield place, row


def _quoted(text: str, separator: str) -> Iterator[tuple[str, Row]]:
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True, skipinitialspace=True)
    while True:
        first = reader.line_num + 1
        try:
            row: Row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line
            row = Unreadable(f"not CSV ({error}); put quotes around the cell, and double the quotes in it.")
        yield f"line {first}" if reader.line_num <= first else f"lines {first} to {reader.line_num}", row


def _tab_separated(text: str) -> Iterator[tuple[str, Row]]:
    """Rows of TSV. Some programs quote cells that contain quotes, as in CSV; others, such as PartiPrompts', write quotes as
    they are. A file is of the first kind if all its cells with quotes are quoted."""
    lines = text.split("\n")
    quoted = all(_QUOTED.fullmatch(cell) for line in lines if '"' in line for cell in line.split("\t") if '"' in cell)
    for number, line in enumerate(lines, 1):
        cells = line.split("\t")
        yield f"line {number}", [cell[1:-1].replace('""', '"') if quoted and '"' in cell else cell for cell in cells]
