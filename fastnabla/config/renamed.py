"""Renamed fields and new defaults: old command lines and the folders of old runs keep their meaning.

The next release drops the old names on the command line. Those in run folders stay readable, so that old runs can be
resumed.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger("fastnabla")


@dataclasses.dataclass(frozen=True, slots=True)
class Renamed:
    """What a field is called now."""

    name: str
    """SECTION.FIELD; the section is unchanged."""
    values: Mapping[Any, Any] | None = None
    """Old value → new value; None if the values are the same."""


RENAMED: dict[str, Renamed] = {
    "objective.guidance": Renamed("objective.reward_gradient"),
    "objective.strength": Renamed("objective.prior_weight"),
    "objective.reverse": Renamed("objective.reverse_weight"),
    "objective.trust_region": Renamed("objective.trust_region_weight"),
    "memory.checkpoint_unet": Renamed("memory.checkpoint_network"),
    "reward.tf32": Renamed("reward.precision", {True: "tf32", False: "float32"}),
}
"""Old name → new one."""

BEFORE: dict[str, Any] = {"sampler.spacing": None}
"""Field with a new default → what an older configuration without this field stands for."""


def new_name(name: str) -> str:
    """The new name of the field `name`, with a warning, if it was renamed; otherwise `name`.

    A field whose values have changed too keeps its old name, which is then refused like any unknown field.
    """
    renamed = RENAMED.get(name)
    if renamed is None or renamed.values is not None:
        return name
    _warn(name, renamed.name)
    return renamed.name


@functools.cache
def _warn(old: str, new: str) -> None:
    logger.warning("%s is called %s now; the next release drops the old name.", old, new)


def with_new_options(arguments: Sequence[str]) -> list[str]:
    """The command line `arguments` with new names of options, with a warning for each old one.

    Raises:
        ValueError: an option was renamed and has other values now.
    """
    return [_with_new_option(argument) for argument in arguments]


def _with_new_option(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if not option.startswith("--"):
        return argument
    name = option[2:].replace("-", "_")
    renamed = RENAMED.get(name.replace(".no_", "."))
    if renamed is not None and renamed.values is not None:
        raise ValueError(
            f"{argument}: is called --{_option(renamed.name)} now; give {' or '.join(renamed.values.values())}."
        )
    if renamed is None or name not in RENAMED:
        return argument
    _warn(f"--{_option(name)}", f"--{_option(renamed.name)}")
    return f"--{_option(renamed.name)}{equals}{value}"


def _option(name: str) -> str:
    return name.replace("_", "-")


def with_new_names(values: Any) -> Any:
    """The JSON of a configuration, perhaps written by an older version, with new names and the defaults of its version.

    If the new name is present too, or the old value is not valid, the old name is kept and then refused as an unknown field.
    """
    for old, renamed in RENAMED.items():
        section, _, field = old.partition(".")
        _, _, new_field = renamed.name.partition(".")
        part = values.get(section) if isinstance(values, dict) else None
        if not isinstance(part, dict) or field not in part or new_field in part:
            continue
        known = {new: before for before, new in (renamed.values or {}).items() if before is part[field]}
        if renamed.values is not None and not known:
            continue
        value = part[field] if renamed.values is None else next(iter(known))
        values = {**values, section: {name: v for name, v in part.items() if name != field} | {new_field: value}}
    for name, value in BEFORE.items():
        section, _, field = name.partition(".")
        if isinstance(values, dict) and isinstance(values.get(section), dict):
            values = {**values, section: {field: value} | values[section]}
    return values


def with_old_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields`, by dotted name, with the names and values of older versions, to compute the same fingerprints."""
    old = dict(fields)
    for name, renamed in RENAMED.items():
        before = {value: key for key, value in (renamed.values or {}).items()}
        if renamed.name in old and (renamed.values is None or old[renamed.name] in before):
            value = old.pop(renamed.name)
            old[name] = value if renamed.values is None else before[value]
    return old
