"""Readers of prompt sources. Each yields pairs (place, value); the place is a position in the source, for messages.

All raise ValueError, naming the place, if something cannot be read.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any

MAX_LINE = 1 << 20
"""Longest line of a file, in bytes, including the line ending."""


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a UTF-8 text file, with their line endings and without a byte order mark."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            place = f"line {number}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{place}: longer than {MAX_LINE} bytes; give a text file with one prompt per line.")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield place, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from error


def read_json_lines(path: str, field: str) -> Iterator[tuple[str, Any]]:
    """Yield `field` of the JSON object on each line of a UTF-8 file. Blank lines are skipped."""
    for place, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error}); write one object per line.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{place}: a JSON {type(record).__name__}; write one object per line.")
        if field not in record:
            raise ValueError(f"{place}: no field {field!r} among {list(record)!s:.200}; write FILE.jsonl:FIELD.")
        yield place, record[field]


def read_hub(name: str, column: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield a column of a data set on the Hugging Face hub; rows count from 0. Requires the package datasets."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"the package datasets cannot be imported ({error}); run: pip install datasets") from error
    try:
        table = load_dataset(name, split=split)
        values = table[column][:] if column in table.column_names else None
    except Exception as error:  # the hub, the network and a dozen file formats raise all kinds
        raise ValueError(
            f"the split {split!r} of {name!r} cannot be loaded ({error}); check your connection, and both names at "
            f"https://huggingface.co/datasets/{name}."
        ) from error
    if values is None:
        raise ValueError(f"no column {column!r}; use one of {', '.join(table.column_names)}.")
    for row, value in enumerate(values):
        yield f"row {row}", value
