"""The settings of each method's runs.

Later ones override earlier ones: the preset, the method's defaults for that preset, the command line, the variant.
"""

import re
import shlex
from collections.abc import Iterable

import tyro

from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import TESTBED
from fastnabla.config.presets import PRESETS
from fastnabla.config.renamed import new_name
from fastnabla.config.train import TrainConfig

METHOD_SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    # The direct methods make about twice as many updates with the same budget, so a third of the learning rate moves
    # the weights about as far. DDPO trains on every step, as published. None of these has been tuned.
    TESTBED: {
        "refl": {"optimizer.learning_rate": "3e-3"},
        "draft": {"optimizer.learning_rate": "3e-3"},
        "draft-lv": {"optimizer.learning_rate": "3e-3"},
        "ddpo": {"rollout.fraction": "1"},
    }
}
"""Preset → method → field → value."""

PLANNED = ("method", "run", "resume", "seed", "updates", "dry_run", "evaluation.every")
"""Fields that the comparison sets itself."""
COMMON = ("model", "sampler", "reward", "prompts", "evaluation")
"""Sections that must be the same for all methods, so that they are comparable."""


def split_variant(variant: str) -> tuple[str, dict[str, str]]:
    """Split "METHOD" or "METHOD,FIELD=VALUE,…" into the method and its field → value.

    Raises:
        ValueError: the variant does not have this form, or a field is set by the comparison or must be the same for all
            methods.
    """
    method, *texts = variant.split(",")
    if method not in METHODS:
        raise ValueError(f"methods = {variant!r}: {method!r} must be one of {', '.join(METHODS)}.")
    if not re.fullmatch(r"[\w.,=+-]+", variant):
        raise ValueError(
            f"methods = {variant!r}: is part of the names of run folders; use only letters, digits and .+- in values."
        )
    own = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"methods = {variant!r}: write METHOD,FIELD=VALUE, with commas between several.")
        own[_field(name, f"methods = {variant!r}", method)] = value
    return method, own


def _field(name: str, where: str, method: str | None = None) -> str:
    """Normalise and check the name of a field to change, for one `method` or for all.

    Raises:
        ValueError: the field may not be changed.
    """
    field = new_name(name.replace("-", "_"))
    if field in PLANNED:
        raise ValueError(f"{where}: {field} is set by the comparison; see --help for its options.")
    if method and field.partition(".")[0] in COMMON:
        raise ValueError(f"{where}: {field} must be the same for all methods; write --set {field}=VALUE.")
    if method and field in METHODS[method].without:
        raise ValueError(f"{where}: {method} does not use {field}; leave it out.")
    return field


def method_settings(preset: str, variant: str, given: Iterable[str]) -> dict[str, str]:
    """The settings in which the runs of `variant` differ from the preset: field → value.

    Args:
        preset: name of the preset.
        variant: a method or a variant (see `split_variant`), whose own settings take precedence.
        given: settings of the command line: "FIELD=VALUE" for all methods, or "METHOD.FIELD=VALUE" for one method, which
            takes precedence.

    Raises:
        ValueError: a setting does not have this form, or its field is set by the comparison or must be the same for all
            methods.
    """
    (method, varied), common, own = split_variant(variant), {}, {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"set = {text!r}: write FIELD=VALUE for all methods or METHOD.FIELD=VALUE for one.")
        first, _, rest = name.partition(".")
        if first not in METHODS:
            common[_field(name, f"set = {text!r}")] = value
            continue
        field = _field(rest, f"set = {text!r}", first)
        if first == method:
            own[field] = value
    return METHOD_SETTINGS.get(preset, {}).get(method, {}) | common | own | varied


def method_config(preset: str, variant: str, settings: dict[str, str]) -> TrainConfig:
    """The preset's configuration for the method of `variant`, with `settings` applied.

    Values are written as on the command line of `python -m fastnabla.train`, except that flags take True or False. Several
    values are separated by blanks.

    Raises:
        ValueError: the configuration is invalid.
        SystemExit: a field does not exist or a value has the wrong type; a message is printed.
    """
    method, _ = split_variant(variant)
    arguments = [f"--method={method}"]
    for field, value in settings.items():
        arguments += [f"--{field}", *shlex.split(value)]
    return tyro.cli(
        TrainConfig,
        args=arguments,
        default=PRESETS[preset][1],
        prog=f"python -m fastnabla.train {preset} --method {method}",
        config=(tyro.conf.FlagConversionOff,),
    )
