"""Old names of fields on command lines and in the configurations of old runs."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from fastnabla.comparison.settings import method_settings
from fastnabla.config import renamed
from fastnabla.config.fields import dotted
from fastnabla.config.renamed import RENAMED
from fastnabla.config.train import TrainConfig, from_json, to_json
from fastnabla.train import parse

OTHER_VALUES = {
    "objective.guidance": "terminal",
    "objective.strength": 0.5,
    "objective.reverse": 0.25,
    "objective.trust_region": 3.0,
    "memory.checkpoint_unet": True,
    "reward.tf32": True,
}
"""Old name → a value that is not the default."""
SAME_VALUES = [name for name, now in RENAMED.items() if now.values is None]


@pytest.fixture(autouse=True)
def warn_again() -> Iterator[None]:
    renamed._warn.cache_clear()
    yield


def old_json(values: dict[str, Any]) -> str:
    """The default configuration as an older version wrote it, with these values of fields with old names."""
    config = json.loads(to_json(TrainConfig()))
    for name, value in values.items():
        section, _, field = name.partition(".")
        del config[section][RENAMED[name].name.partition(".")[2]]
        config[section][field] = value
    return json.dumps(config)


def test_every_new_name_exists_and_no_old_one() -> None:
    fields = dotted(TrainConfig())
    assert {now.name for now in RENAMED.values()} <= fields.keys()
    assert not RENAMED.keys() & fields.keys()
    assert OTHER_VALUES.keys() == RENAMED.keys()


def test_an_old_configuration_is_read() -> None:
    config = dotted(from_json(old_json(OTHER_VALUES)))
    for name, value in OTHER_VALUES.items():
        now = RENAMED[name]
        assert config[now.name] == (now.values[value] if now.values else value)


@pytest.mark.parametrize("name", RENAMED)
def test_both_names_at_once_are_refused(name: str) -> None:
    values = json.loads(to_json(TrainConfig()))
    section, _, field = name.partition(".")
    values[section][field] = OTHER_VALUES[name]
    with pytest.raises(ValueError, match=rf"{section}\.{field}: no such field"):
        from_json(json.dumps(values))


def test_the_value_under_an_old_name_is_checked() -> None:
    with pytest.raises(ValueError, match=r"objective\.prior_weight = -1\.0: must be finite"):
        from_json(old_json({"objective.strength": -1.0}))


@pytest.mark.slow
@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("equals", ["=", None])
@pytest.mark.parametrize("name", SAME_VALUES)
def test_an_old_option_is_taken_with_a_warning(
    name: str, equals: str | None, dash: str, caplog: pytest.LogCaptureFixture
) -> None:
    option, value = f"--{name.replace('_', dash)}", str(OTHER_VALUES[name])
    with caplog.at_level(logging.WARNING):
        config = parse(["testbed", *([option, value] if equals is None else [f"{option}={value}"])])
    assert dotted(config)[RENAMED[name].name] == OTHER_VALUES[name]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"--{name.replace('_', '-')} is called --")
    assert RENAMED[name].name.replace("_", "-") in record.getMessage()


@pytest.mark.parametrize("argument", ["--reward.tf32", "--reward.no-tf32", "--reward.tf32=True"])
def test_an_option_with_other_values_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: is called --reward.precision now; give tf32 or float32"):
        parse(["sd15-aesthetic", argument])


def test_new_names_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    parse(["testbed", *(f"--{RENAMED[name].name}={OTHER_VALUES[name]}" for name in SAME_VALUES)])
    assert not caplog.records


def test_old_names_in_a_comparison(caplog: pytest.LogCaptureFixture) -> None:
    settings = method_settings("testbed", "residual-db,objective.strength=0.5", ["objective.trust-region=3"])
    assert settings == {"objective.trust_region_weight": "3", "objective.prior_weight": "0.5"}
    assert len(caplog.records) == 2
