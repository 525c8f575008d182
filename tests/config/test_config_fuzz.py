"""Whatever is in config.json or on the command line: a configuration, or an error that names the field; never a part of a
run."""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastnabla import train
from fastnabla.config.train import LARGEST, TrainConfig, from_json, load_run, to_json
from fastnabla.run.resuming import flat
from fastnabla.training import command

FIELDS = sorted(flat(TrainConfig()))
ODD = st.text(st.sampled_from("\0\x1b[/]$é猫👩\u202e\ud800=-.: a") | st.characters(), max_size=12)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 2**31, 10**30, -(10**30), 0.5, -0.0, 1e308, 1e-320, math.nan, math.inf])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | ODD | st.sampled_from(["cpu", "none", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD, inner, max_size=3),
    max_leaves=5,
)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with fields of dotted names replaced."""
    values = json.loads(json.dumps(values))
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (values[section] if section else values)[field] = value
    return values


DEFAULTS = json.loads(to_json(TrainConfig()))


def assert_types(config: object) -> None:
    """Every field has a value of its type."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint):
            assert_types(value)
        elif isinstance(value, tuple):
            assert all(isinstance(part, str) for part in value)
        else:
            kinds = typing.get_args(hint) or (hint,)
            kinds = [k for kind in kinds for k in (typing.get_args(kind) or (kind,))]
            assert (
                any(type(value) is kind for kind in kinds if isinstance(kind, type))
                or value in kinds
                or (isinstance(value, Path) and Path in kinds)
            ), (name, value)
            assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.slow
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
@settings(max_examples=400)
@example(changes={"seed": "0"})
@example(changes={"rollout.fraction": True})
@example(changes={"lora.targets": "to_q"})
@example(changes={"reward.terms": [None]})
@example(changes={"updates": 10**400})
def test_fields_of_any_value(changes: dict[str, Any]) -> None:
    try:
        config = from_json(json.dumps(changed(DEFAULTS, changes)))
    except ValueError as error:
        names = {word for name in changes for word in (name, name.rpartition(".")[2], name.partition(".")[0])}
        assert any(name in str(error) for name in names), error
        assert len(str(error)) < 1000
    else:
        assert_types(config)
        assert from_json(to_json(config)) == config


@pytest.mark.slow
@given(name=st.sampled_from([*FIELDS, *DEFAULTS]), key=ODD, value=VALUES, keep=st.booleans())
@settings(max_examples=150)
def test_unknown_and_missing_fields_and_sections(name: str, key: str, value: Any, keep: bool) -> None:
    section, _, field = name.rpartition(".")
    values = json.loads(json.dumps(DEFAULTS))
    place = values[section] if section else values
    removed = place if keep else place.pop(field)
    place[key] = value
    if key == "" or key not in place or key in FIELDS:
        return
    with pytest.raises(ValueError, match=r"no such field|is missing|must be") as error:
        from_json(json.dumps(values))
    assert removed is not None or len(str(error.value)) < 1000


CONTENTS = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode())


@given(content=CONTENTS | ODD.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"[" * 100_000)
@example(content=b'{"seed": 1, "seed": 2}')
@example(content=b"1" * 5000)
def test_any_bytes_for_a_configuration(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_run(tmp_path)


class Reached(Exception):
    """The command line is valid as far as it can be told before anything is loaded."""


def stop(*_: object) -> None:
    raise Reached


OPTIONS = st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS])
TEXTS = (
    st.sampled_from(["None", "nan", "-1", "0", "1e999", "True", "--", "-h=", "auto", "a" * 300])
    | ODD
    | NUMBERS.map(str)
)
ARGUMENTS = st.lists(st.tuples(OPTIONS, TEXTS).map("=".join) | OPTIONS | TEXTS, max_size=4)


@pytest.mark.slow
@given(preset=st.sampled_from([[], ["testbed"], ["sd15-hpsv2"]]), arguments=ARGUMENTS)
@settings(max_examples=20)
@example(preset=["testbed"], arguments=["--run", "a" * 5000])
@example(preset=["testbed"], arguments=["--run", "a\0b"])
@example(preset=["testbed"], arguments=["--run", "\udcff", "--resume", "auto"])
@example(preset=["testbed"], arguments=["--resume", "a" * 5000])
@example(preset=["testbed"], arguments=["--resume", "[/]\x1b[2J\udcff"])
@example(preset=["testbed"], arguments=["--updates", "9" * 5000])
@example(preset=["testbed"], arguments=["--vram", "1e300"])
def test_any_command_line(preset: list[str], arguments: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(command, "check_model", stop)
        try:
            assert train.main([*preset, *arguments]) == 2
        except SystemExit as end:
            assert end.code in (0, 2)  # 0 is --help
        except Reached:
            pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in FIELDS if type(flat(TrainConfig())[name]) is int and name != "seed"])
def test_whole_numbers_have_an_upper_bound(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.rpartition('.')[2]} = "):
        from_json(json.dumps(changed(DEFAULTS, {name: LARGEST + 1})))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rollout.trajectories", "lora.rank", "evaluation.samples"])
def test_what_does_not_fit_into_memory_is_refused(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["testbed", f"--{name}={LARGEST}"]) == 2
    message = capsys.readouterr().err
    assert "memory ran out" in message and f"{name} = {LARGEST}" in message and "Traceback" not in message
    assert not any(tmp_path.iterdir())
