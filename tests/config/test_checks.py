"""Checks of several fields together: a method is asked only about fields that it has, and every remedy is accepted."""

import dataclasses
import itertools
import re
from typing import Any

import pytest

from fastnabla.config.checks import CHECKS, Check
from fastnabla.config.drawn_steps import drawn_steps, fraction_of
from fastnabla.config.fields import dotted
from fastnabla.config.methods import METHODS
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig

FIELDS = dotted(TrainConfig())
CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "direct.k": {"direct.k": 51},
    "direct.guidance_scale": {"direct.guidance_scale": 2.0, "sampler.guidance_scale": 1.0},
    "objective.reverse_weight": {"objective.reverse_weight": 0.0, "objective.reverse_target": "reference"},
    "objective.reverse_second_order": {"objective.reverse_second_order": True, "objective.reverse_target": "reference"},
    "policy_gradient.min_count": {"policy_gradient.min_count": 9, "policy_gradient.window": 5},
    "memory.shard": {"memory.shard": True},
    "model.quantise": {"model.quantise": "nf4", "lora.rank": 0},
    "compute.attention": {"compute.attention": "xformers", "deterministic": True},
    "updates": {"updates": 5},
    "rollout.fraction": {"sampler.steps": 25},
}
"""Field that the error names → values that contradict each other."""


def configured(preset: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """`preset` with fields of dotted names replaced."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        (changes.setdefault(section, {}) if section else changes)[field] = value
    for section, fields in changes.items():
        if isinstance(fields, dict):
            changes[section] = dataclasses.replace(getattr(preset, section), **fields)
    return dataclasses.replace(preset, **changes)


def typed(name: str, text: str) -> Any:
    """The value of the field `name` that `text` writes."""
    kind = type(FIELDS[name])
    return {"None": None, "True": True, "False": False}[text] if kind in (bool, type(None)) else kind(text)


def remedies(message: str) -> list[dict[str, Any]]:
    """The changes that an error proposes: "use 0.2 or 0.5" of its field, and options "--flow.kind none"."""
    name = message.partition(" = ")[0]
    options = [
        {field.replace("-", "_"): typed(field.replace("-", "_"), value)}
        for field, value in re.findall(r"--([\w.-]+) ([\w.]*\w)", message)
    ]
    values = re.search(r"\b(?:use|[Ll]eave it) (?:at least |at most )?(?!a\b)([\w.]*\w)(?: or ([\d.]*\d))?", message)
    return options + [{name: typed(name, value)} for value in (values.groups() if values else ()) if value]


def named(message: str) -> set[str]:
    """The fields that an error names."""
    return {name.replace("-", "_") for name in re.findall(r"[a-z_]+\.[a-z_-]+", message)} & FIELDS.keys()


def test_every_check_has_a_contradiction_here() -> None:
    assert [check.fields[0] for check in CHECKS] == list(CONTRADICTIONS)
    assert {field for check in CHECKS for field in check.fields} <= FIELDS.keys()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.fields[0])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_asked_about_its_own_fields(method: str, check: Check) -> None:
    """A contradiction between fields that it does not have is none. Each remedy alone is accepted."""
    values = {"method": method} | CONTRADICTIONS[check.fields[0]]
    without = METHODS[method].without
    if any(field in without for field in check.fields):
        configured(TrainConfig(), values)
        return
    with pytest.raises(ValueError, match=rf"^{re.escape(check.fields[0])} = ") as error:
        configured(TrainConfig(), values)
    message = str(error.value)
    assert not named(message) & set(without), message
    assert remedies(message), message
    for remedy in remedies(message):
        ((name, value),) = remedy.items()
        assert METHODS[method].accepts(name, value), message
        configured(TrainConfig(), values | remedy)


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_recipe_names_fields_of_the_method(method: str) -> None:
    with pytest.raises(ValueError, match="reference_compat") as error:
        configured(PRESETS["testbed"][1], {"method": method, "reference_compat": True})
    assert not named(str(error.value)) & set(METHODS[method].without)


@pytest.mark.parametrize("preset", ["testbed", "stable-diffusion"])
def test_few_steps_and_trajectories_are_accepted_or_refused_with_a_remedy(preset: str) -> None:
    """Each error names another field, until its remedies are applied."""
    refused = 0
    for method, steps, trajectories in itertools.product(METHODS, (2, 4, 25), (1, 2, 3)):
        start = {"method": method, "sampler.steps": steps, "rollout.trajectories": trajectories}
        pending = [start]
        while pending:
            values = pending.pop()
            try:
                configured(PRESETS[preset][1], values)
            except ValueError as error:
                message = str(error)
                assert not named(message) & set(METHODS[method].without) and remedies(message), (values, message)
                for remedy in remedies(message):
                    assert not remedy.keys() & values.keys(), (values, message)
                    pending.append(values | remedy)
                refused += 1
    assert refused > 20


def test_fractions_draw_the_steps_that_they_are_for() -> None:
    for num_steps in (2, 3, 7, 25, 50, 999, 2**31 - 1):
        for drawn in {1, num_steps // 3 or 1, num_steps - 1, num_steps}:
            fraction = fraction_of(drawn, num_steps)
            assert 0 < fraction <= 1 and drawn_steps(num_steps, fraction) == drawn
    assert [fraction_of(1, 3), fraction_of(1, 25), fraction_of(5, 25), fraction_of(2, 3)] == [0.4, 0.04, 0.2, 0.7]
