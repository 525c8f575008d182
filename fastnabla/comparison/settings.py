"""The settings of each method's runs: the preset's, what suits the method there, the command line's, and the variant's, in
this order."""

import re
import shlex
from collections.abc import Iterable

import tyro

from fastnabla.config.methods import METHODS
from fastnabla.config.presets import PRESETS
from fastnabla.config.renamed import new_name
from fastnabla.config.sections import TESTBED
from fastnabla.config.train import TrainConfig

METHOD_SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    # The direct methods make two to three times as many updates of the same passes; a third of the step size lets the
    # weights go as far in all. DDPO trains on every step, as published. None of these has been tuned.
    TESTBED: {
        "refl": {"optimizer.learning_rate": "3e-3"},
        "draft": {"optimizer.learning_rate": "3e-3"},
        "draft-lv": {"optimizer.learning_rate": "3e-3"},
        "ddpo": {"rollout.fraction": "1"},
    }
}
"""Preset → method → field → value."""

PLANNED = ("method", "run", "resume", "seed", "updates", "dry_run", "evaluation.every")
"""Fields that the comparison itself sets."""
COMMON = ("model", "sampler", "reward", "prompts", "evaluation")
"""Sections that say what is compared, so no method has its own."""


def split_variant(variant: str) -> tuple[str, dict[str, str]]:
    """The method, and field → value of its own, of "METHOD" or of "METHOD,FIELD=VALUE,…".

    Raises:
        ValueError: it is not of this form, or of a field that the comparison sets, or would make methods incomparable.
    """
    method, *texts = variant.split(",")
    if method not in METHODS:
        raise ValueError(f"methods = {variant!r}: {method!r} is none of {', '.join(METHODS)}.")
    if not re.fullmatch(r"[\w.,=+-]+", variant):
        raise ValueError(
            f"methods = {variant!r}: names its runs' folders; of a value only letters, digits and .+- can be."
        )
    own = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"methods = {variant!r}: write METHOD,FIELD=VALUE, and commas between several.")
        own[_field(name, f"methods = {variant!r}", method)] = value
    return method, own


def _field(name: str, where: str, method: str | None = None) -> str:
    """The field called `name`, if the comparison may change it, of one `method` or of all.

    Raises:
        ValueError: it may not.
    """
    field = new_name(name.replace("-", "_"))
    if field in PLANNED:
        raise ValueError(f"{where}: {field} is set by the comparison; see --help for its own options.")
    if method and field.partition(".")[0] in COMMON:
        raise ValueError(f"{where}: {field} must be the same for all methods; write --set {field}=VALUE.")
    if method and field in METHODS[method].without:
        raise ValueError(f"{where}: {method} has no use for {field}; leave it out.")
    return field


def method_settings(preset: str, variant: str, given: Iterable[str]) -> dict[str, str]:
    """The settings in which the runs of `variant` differ from the preset: field → value.

    Args:
        preset: its name.
        variant: a method, or with settings that no other of its runs have: see `split_variant`. They win.
        given: settings of the command line, "FIELD=VALUE" of all methods, or "METHOD.FIELD=VALUE" of one, which wins.

    Raises:
        ValueError: one is not of this form, or of a field that the comparison sets, or would make methods incomparable.
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
    """The preset's configuration for the method of `variant`, changed by `settings`.

    Values are written as on the command line of `python -m fastnabla.train`; True and False are words, and several
    values are separated by blanks.

    Raises:
        ValueError: the configuration is not valid.
        SystemExit: with a message, if there is no such field or a value is not of its type.
    """
    method, _ = split_variant(variant)
    arguments = [f"--method={method}"]
    for field, value in settings.items():
        arguments += [f"--{field}", *shlex.split(value)]
    return tyro.cli(
        TrainConfig,
        args=arguments,
        default=PRESETS[preset][1],
        prog=variant,
        config=(tyro.conf.FlagConversionOff,),
    )
