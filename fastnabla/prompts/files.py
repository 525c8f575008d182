"""Prompts in a file: plain lines, JSON, JSON Lines, CSV or TSV, told apart by content."""

import codecs
import os
import re

from fastnabla.prompts import json_files, tables
from fastnabla.prompts.columns import is_default
from fastnabla.prompts.entries import Entries

MAX_FILE = 1 << 30
"""Largest file, in bytes."""

_BYTE_ORDER_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_NOT_TEXT = {
    b"\x1f\x8b": "a gzip",
    b"PK\x03\x04": "a zip or Excel",
    b"PAR1": "a Parquet",
    b"ARROW1": "an Arrow",
    b"%PDF": "a PDF",
}
"""First bytes of files that are not text → what they are."""


def read_file(path: str, column: str | None) -> Entries:
    """Read the prompts of a file.

    Text that is JSON, or whose first line is a JSON object, is JSON. A table is never guessed from its content, because
    prompts contain commas: a file is one if it is called .csv or .tsv, or if `column` is given. Any other text has one
    prompt per line, unless the first line looks like a header; blank lines are skipped. Line endings are \\n, \\r\\n or \\r.

    Args:
        path: a file, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.
        column: see `column_of`.

    Raises:
        ValueError: it is not clear what the file is, or where its prompts are.
        OSError: the file cannot be read.
    """
    text = _text(path)
    if not text.strip():
        return ()
    suffix = os.path.splitext(path)[1].lower()
    if suffix in json_files.SUFFIXES or re.match(r"\s*[\[{]", text):
        entries = json_files.read_json(text, suffix, column)
        if entries is not None:
            return entries
    if suffix in tables.SUFFIXES or column is not None:
        return tables.read_table(text, suffix, column)
    lines = text.split("\n")
    _check_first(next(filter(str.strip, lines)))
    return ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())


def _check_first(line: str) -> None:
    if "\t" in line.strip() or any(is_default(cell.strip(' "')) for cell in re.split("[,;]", line)):
        raise ValueError(
            f"the first line, {line!r:.100}, looks like the header of a table. If it is one, choose a column with "
            "prompts.column; otherwise, put another prompt first."
        )


def _text(path: str) -> str:
    """The text of a file, with \\n as line ending. Bytes that are not UTF-8 become lone surrogates (PEP 383)."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"has more than {MAX_FILE} bytes; give a file of prompts.")
    kind = next((kind for first, kind in _NOT_TEXT.items() if data.startswith(first)), None)
    if kind is not None:
        raise ValueError(f"is {kind} file; unpack or convert it to a text file, JSON, CSV or TSV.")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"begins like {encoding.upper()}, but is not ({error.reason}); save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
