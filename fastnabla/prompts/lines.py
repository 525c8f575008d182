"""Prompts in a text file, one per line."""

import re

from fastnabla.prompts.columns import is_default
from fastnabla.prompts.entries import Entries

_CAPTIONS = {"caption", "captions", "text", "texts"}
"""Names of columns that are a header if all other cells of the line are single words."""
_FIRST_LINES = {
    r"\s*<(!doctype|html|\?xml)\b": "is HTML or XML; download the file itself instead of the page that shows it.",
    r"\s*(#+|//+|/\*)(\s|$)": "looks like a comment; remove comments, because every line is a prompt.",
}
"""Pattern of a first line → what is wrong with the file."""
_EVERY_LINE = {
    r"""\s*(["']).*\1\s*,?\s*""": "is in quotes, which would be part of the prompts; remove them, or write a JSON list.",
    r"\s*(?:[-*•–]|\d+[.)])\s.*": "begins like an item of a list; remove the dashes or numbers, because they would be part of the prompts.",
}
"""Pattern of every line → what is wrong with the file."""


def read_lines(text: str) -> Entries:
    """Read one prompt per line. Blank lines are skipped.

    Args:
        text: the file's text, with \\n as line ending. Not blank.

    Raises:
        ValueError: the first line looks like a header, a comment or HTML, or every line is in quotes or an item of a list.
    """
    lines = text.split("\n")
    first = next(filter(str.strip, lines))
    if _is_header(first):
        raise ValueError(
            f"the first line, {first!r:.100}, looks like the header of a table. If it is one, choose a column with "
            "prompts.column; otherwise, put another prompt first."
        )
    for pattern, problem in _FIRST_LINES.items():
        if re.match(pattern, first, re.IGNORECASE):
            raise ValueError(f"the first line, {first!r:.100}, {problem}")
    for pattern, problem in _EVERY_LINE.items():
        if all(map(re.compile(pattern).fullmatch, filter(str.strip, lines))):
            raise ValueError(f"every line, as {first!r:.100}, {problem}")
    return ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())


def _is_header(line: str) -> bool:
    cells = [cell.strip(' "') for cell in re.split("[,;|]", line.strip().rstrip(":"))]
    captions = not _CAPTIONS.isdisjoint(map(str.lower, cells)) and all(re.fullmatch(r"\w*", cell) for cell in cells)
    return "\t" in line.strip() or captions or any(map(is_default, cells))
