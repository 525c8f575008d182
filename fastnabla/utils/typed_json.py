"""Dataclasses from JSON, with every field checked against its type, since a configuration may have been edited by hand.

pydantic does not replace this: its strict mode accepts keys that appear twice and sections that are missing, and it
refuses the path of a folder whose name is not UTF-8.
"""

import dataclasses
import json
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def parse(text: str) -> Any:
    """Parse the JSON value `text`.

    Raises:
        ValueError: it is not valid JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)}: appears twice; give it once.")
    return values


def dataclass_of(cls: type[T], values: Any, prefix: str = "") -> T:
    """An instance of `cls` with the fields of the JSON object `values`. Fields that are dataclasses are nested objects.

    A missing field gets its default, since an older version may not have had it. A missing object is an error.

    Args:
        cls: a dataclass.
        values: parsed JSON.
        prefix: put before field names in messages.

    Raises:
        ValueError: a field is unknown, has a value of the wrong type, or is refused by `cls`.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the whole'} = {_SHORT.repr(values)}: must be an object of fields.")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ValueError(f"{prefix}{name!s:.100}: no such field; there are {', '.join(hints)}.")
    read = {}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            if name not in values:
                raise ValueError(f"{prefix}{name}: is missing; must be an object of fields.")
            read[name] = dataclass_of(hint, values[name], f"{prefix}{name}.")
        elif name in values:
            read[name] = _value(hint, values[name], f"{prefix}{name}")
    return cls(**read)


def _value(hint: Any, value: Any, field: str) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in kinds:
        if _is(kind, value):
            return kind(value) if kind in (float, Path) else tuple(value) if isinstance(value, list) else value
    expected = " or ".join(map(_words, kinds))
    raise ValueError(f"{field} = {_SHORT.repr(value)}: must be {expected}.")


def _is(kind: Any, value: Any) -> bool:
    """Whether `value` is JSON for the type `kind`."""
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e308 and not math.isnan(value)
    return type(value) is {Path: str}.get(kind, kind)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        return "a list of texts"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, "null")
