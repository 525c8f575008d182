"""Prompts in a file: plain lines, JSON, JSON Lines, CSV or TSV, told apart by content."""

import codecs
import os
import re

from fastnabla.prompts import json_files, tables
from fastnabla.prompts.entries import Entries
from fastnabla.prompts.lines import read_lines

MAX_FILE = 1 << 30
"""Largest file, in bytes."""

_BYTE_ORDER_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "ZIP or Excel",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
    b"\x28\xb5\x2f\xfd": "Zstandard",
}
"""First bytes → format. A file that begins so and has null bytes is not text."""


def read_file(path: str, column: str | None) -> Entries:
    """Read the prompts of a file.

    Text that is JSON, or whose first line is a JSON object, is JSON. A table is never guessed from its content, because
    prompts contain commas: a file is one if it is called .csv or .tsv, or if `column` is given. Any other text has one
    prompt per line. Line endings are \\n, \\r\\n or \\r.

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
    return read_lines(text)


def _text(path: str) -> str:
    """The text of a file, with \\n as line ending. Bytes that are not UTF-8 become lone surrogates (PEP 383)."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"has more than {MAX_FILE} bytes; give a file of prompts.")
    binary = next((name for mark, name in _BINARY.items() if data.startswith(mark) and b"\0" in data), None)
    if binary is not None:
        raise ValueError(f"is a {binary} file; unpack it, or write its prompts to a text, JSON or CSV file.")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("is a pointer of Git LFS instead of the file; run: git lfs pull")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 3 * data.count(0) >= len(data) > 0:
        raise ValueError("looks like UTF-16 without a byte order mark; save the file as UTF-8.")
    try:
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"begins like {encoding.upper()}, but is not ({error.reason}); save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
