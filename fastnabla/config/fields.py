"""Dotted names of fields, such as ``rollout.updates``."""

import dataclasses
from typing import Any


def dotted(config: Any) -> dict[str, Any]:
    """The fields of the dataclass `config` by name; those of its sections as SECTION.FIELD."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= {f"{field.name}.{name}": part for name, part in dotted(value).items()}
        else:
            values[field.name] = value
    return values


def names_of(section: str, cls: type, but: tuple[str, ...] = ()) -> tuple[str, ...]:
    """SECTION.FIELD for each field of the dataclass `cls` that is not in `but`."""
    return tuple(f"{section}.{field.name}" for field in dataclasses.fields(cls) if field.name not in but)
