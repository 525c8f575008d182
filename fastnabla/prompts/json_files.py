"""Prompts in JSON: a list, an object, or one value per line."""

import json
import re
from collections.abc import Iterator
from typing import Any

from fastnabla.prompts.columns import WITHOUT, column_of, is_default, listed
from fastnabla.prompts.entries import Entries, Unreadable
from fastnabla.utils.typed_json import parse

LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINES)
LIKE_JSON = re.compile(r"""\s*[\[{](?:[\[{\s]*["']|[\[{ \t]*$)""", re.MULTILINE)
"""Text that begins like JSON. Prompts such as "[oil] a cat" and "{{detailed}} cat" do not."""

_PHRASE = re.compile(r"\s|[^\x00-\x7f]|[.!?]$")
"""Matches texts of several words, in other scripts or with a full stop, which are prompts rather than identifiers."""
_MISSING = object()


def read_json(text: str, suffix: str, column: str | None) -> Entries | None:
    """Read the prompts of a JSON document or of JSON Lines; None if `text` is neither.

    - Of a list, each text is a prompt, or each object has one in the field `column`.
    - Of an object, the value of the key `column` has the prompts. It may also have an object per prompt, or a list of
      them, or its keys are the prompts. Of an object with numbers as keys, the values are.
    - Of JSON Lines, each line is like an element of a list.

    Args:
        text: the file's text, with \\n as line ending.
        suffix: the file's, in lower case. A file with one of `SUFFIXES` must be JSON.
        column: key or field. None: prompt or prompts, in any case. Keys of nested objects are joined by dots; * stands
            for all keys, as in \\*.text.

    Raises:
        ValueError: the text begins like JSON and is not valid, there is no such key or field, or it is not clear where the
            prompts are. The message names the keys or fields.
    """
    try:
        document = parse(text)
    except ValueError as error:
        return _of_lines(text, suffix, column, error)
    if suffix in LINES and isinstance(document, dict) and "\n" not in text.strip():
        return _of_list([("line 1", document)], column)
    try:
        return _of_value(document, column)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _of_lines(text: str, suffix: str, column: str | None, error: ValueError) -> Entries | None:
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = _parsed(lines[0][1]) if lines else None
    if isinstance(first, dict) or (isinstance(first, str) and suffix in SUFFIXES) or suffix in LINES:
        values = [(place, _parsed(line)) for place, line in lines]
        # Of a document with a mistake, few lines are valid by themselves.
        good = sum(not isinstance(value, Unreadable) for _, value in values)
        if 2 * good >= len(values) or isinstance(first, dict):
            return _of_list(values, column)
    reason = str(error).rstrip(".")
    if suffix in SUFFIXES:
        raise ValueError(f"not valid JSON ({reason}); correct it, or rename a file with one prompt per line to .txt.")
    if LIKE_JSON.match(text):
        raise ValueError(
            f"begins like JSON, but is not valid ({reason}); correct it. If every line is a prompt, write them as a JSON list."
        )
    return None


def _parsed(line: str) -> Any:
    try:
        return parse(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON ({error.msg} at column {error.colno}).")
    except ValueError as error:
        return Unreadable(f"not JSON ({str(error).rstrip('.')}).")


def _of_value(value: Any, column: str | None, place: str = "") -> Entries:
    if isinstance(value, dict):
        return _of_object(value, column, place)
    values = value if isinstance(value, list) else [value]
    return _of_list([(f"{place}entry {number}", part) for number, part in enumerate(values, 1)], column)


def _of_list(values: list[tuple[str, Any]], column: str | None) -> Entries:
    records = [value for _, value in values if isinstance(value, dict)]
    if not records and column is None:
        return values
    if not records:
        raise ValueError(f"has no fields, and so no {column!r}; {WITHOUT}")
    if column is None or not any(_has(record, column) for record in records):
        column = column_of((name for record in records for name in record), column)
    return [(place, _field(value, column)) for place, value in values]


def _field(value: Any, column: str) -> Any:
    if isinstance(value, Unreadable):
        return value
    if not isinstance(value, dict):
        return Unreadable(f"must be an object with the field {column!r}, not {type(value).__name__}.")
    found = _at(value, column)
    return Unreadable(f"no field {column!r} among {listed(value)}.") if found is _MISSING else found


def _of_object(value: dict[str, Any], column: str | None, place: str) -> Entries:
    # The value of a key
    step = _step(value, column)
    if step is not None:
        return _of_value(value[step[0]], step[1], place)
    if column is not None and column.partition(".")[0] == "*":
        rest = column.partition(".")[2] or None
        return [entry for key, part in value.items() for entry in _of_value(part, rest, f"{place}{listed([key])}, ")]

    # Objects with the field
    numbered = column is None and all(map(str.isdecimal, value))
    parts = [(f"{place}{listed([key])}", part) for key, part in value.items()]
    if all(isinstance(part, dict) for _, part in parts) and (numbered or any(_has(part, column) for _, part in parts)):
        return _of_list(parts, column)
    lists = [key for key, part in value.items() if isinstance(part, list) and any(_has(p, column) for p in part)]
    if len(lists) == 1:
        return _of_value(value[lists[0]], column, place)
    if lists:
        field = f".{column}" if column else ""
        choices = listed(f"{key}{field}" for key in (*lists, "*"))
        raise ValueError(f"has several lists of prompts; choose one with prompts.column: {choices}. * is all of them.")
    if column is not None:
        raise ValueError(f"no key or field {column!r}; use one of {listed(_choices(value))}.")

    # The keys, or all values
    if numbered:
        return [(where, text) for where, part in parts for text in (part if isinstance(part, list) else [part])]
    if len(value) == 1 and not _mostly_phrases(value):
        (part,) = value.values()
        if isinstance(part, list) and _mostly_phrases(_texts(part)):
            return _of_value(part, None, place)
    if _keys_are_prompts(value):
        return [(f"{place}entry {number}", key) for number, key in enumerate(value, 1)]
    raise ValueError(
        "an object of which the keys or the values may be the prompts. Choose a key with prompts.column, or * for all: "
        f"{listed(_choices(value))}. If the keys are the prompts, write them as a list."
    )


def _choices(value: dict[str, Any]) -> Iterator[str]:
    """The keys; for a list of objects KEY.FIELD for each field."""
    for key, part in value.items():
        fields = (
            dict.fromkeys(name for item in part if isinstance(item, dict) for name in item)
            if isinstance(part, list)
            else {}
        )
        yield from (f"{key}.{name}" for name in fields) if fields else (key,)


def _step(value: dict[str, Any], column: str | None) -> tuple[str, str | None] | None:
    """The key that `column` begins with, and the rest of the column. None if the object has no such key."""
    if column is None:
        return (column_of(value, None), None) if any(map(is_default, value)) else None
    if column in value:
        return column, None
    key, _, rest = column.partition(".")
    return (key, rest) if rest and key in value else None


def _at(record: dict[str, Any], column: str) -> Any:
    if column in record:
        return record[column]
    key, _, rest = column.partition(".")
    inner = record.get(key)
    return _at(inner, rest) if rest and isinstance(inner, dict) else _MISSING


def _has(value: Any, column: str | None) -> bool:
    if not isinstance(value, dict):
        return False
    return any(map(is_default, value)) if column is None else _at(value, column) is not _MISSING


def _keys_are_prompts(value: dict[str, Any]) -> bool:
    """Whether the prompts can only be the keys of an object, with any values that tell about them."""
    parts = value.values()
    inner_keys = _mostly_phrases([key for part in parts if isinstance(part, dict) for key in part])
    inner_texts = _mostly_phrases([text for part in parts for text in _texts(part)])
    if _mostly_phrases(value):
        return not inner_keys and (not inner_texts or all(isinstance(part, dict) for part in parts))
    # Keys like identifiers: the values must be numbers, or objects of the same fields without lists and objects.
    fields = {tuple(part) if isinstance(part, dict) else type(part) for part in parts}
    flat = all(not isinstance(p, list | dict) for part in parts if isinstance(part, dict) for p in part.values())
    return not inner_keys and not inner_texts and len(fields) == 1 and flat and not fields & {str, list}


def _texts(value: Any) -> list[str]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [part for part in parts if isinstance(part, str)]


def _mostly_phrases(texts: Any) -> bool:
    return 2 * sum(bool(_PHRASE.search(text)) for text in texts) > len(texts)
