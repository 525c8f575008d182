"""Whatever settings are combined: a run names the field that it refuses before it starts, or it trains, and resumes bit for bit."""

import contextlib
import json
import tempfile
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from fastnabla.config.fields import dotted
from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import ModelConfig
from fastnabla.config.train import TrainConfig, from_json, to_json
from fastnabla.training.guards import BoundPassed
from fastnabla.training.trainer import Trainer
from tests.config.test_config_fuzz import changed
from tests.faults import assert_same_result
from tests.runs import copy_after_update_1, small, smallest, without_pictures

VALUES = {int: (1, 2, 3, 0), float: (0.5, 1.0, 0.1, 2.0, 0.0), bool: (False, True), type(None): (None,)}
"""Type of a field → values. Those of a `Literal` are its own; fields of text have none."""
LEFT_OUT = (
    *("seed", "updates", "checkpoint_every", "tracker", "device", "backend"),
    *("model.", "prompts.", "reward.", "distributed.", "compute.", "optimizer.learning_rate", "flow.learning_rate"),
)
"""Beginnings of the names of fields that stay as they are: what a run is made of, and what needs a GPU or a minute."""


def values_of(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    kinds = typing.get_args(hint)
    return tuple(value for kind in kinds for value in values_of(kind)) if kinds else VALUES.get(hint, ())


def hints(cls: type, prefix: str = "") -> dict[str, Any]:
    """The types of the fields of a configuration, by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        found |= hints(hint, f"{name}.") if hasattr(hint, "__dataclass_fields__") else {prefix + name: hint}
    return found


CHOICES = {
    name: values
    for name, hint in hints(TrainConfig).items()
    if (values := values_of(hint)) and not name.startswith(LEFT_OUT)
}
CHANGES = st.lists(st.sampled_from(sorted(CHOICES)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(CHOICES[name]) for name in names})
)


def trainer_of(config: TrainConfig) -> Trainer:
    return without_pictures(Trainer.from_config(config))


def train(trainer: Trainer, folder: Path, resume: bool = False) -> None:
    with contextlib.suppress(BoundPassed):  # the second update is the last one
        trainer.train(folder, resume=resume)


@pytest.mark.slow
@given(family=st.sampled_from(["sd15", "sd3", "flux"]), method=st.sampled_from(sorted(METHODS)), changes=CHANGES)
@settings(max_examples=12)
@example(family="sd15", method="refl", changes={"direct.guidance_scale": 1.0})
def test_any_settings(family: str, method: str, changes: dict[str, Any]) -> None:
    model = ModelConfig(name=smallest(family), dtype="float32", height=8, width=8)
    base = small(updates=2, checkpoint_every=1, model=model)
    try:
        config = from_json(json.dumps(changed(json.loads(to_json(base)), {"method": method} | changes)))
        trainer = trainer_of(config)
    except ValueError as error:
        event("refused")
        assert any(name in str(error) for name in dotted(base)), error
        return
    event("trained")
    with tempfile.TemporaryDirectory() as above:
        whole, resumed = Path(above) / "whole", Path(above) / "resumed"
        whole.mkdir()
        copy_after_update_1(trainer, whole, resumed)
        train(trainer, whole)
        assert all(parameter.isfinite().all() for parameter in trainer.step.parameters)
        train(trainer_of(config), resumed, resume=True)
        assert_same_result(resumed, whole)
