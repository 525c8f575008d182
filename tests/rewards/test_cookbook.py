"""The cookbook's rewards, as printed in docs/rewards.md, run by the commands printed below them."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fastnabla.rewards.__main__ import main

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [line for line in re.findall(r"^    python -m fastnabla.rewards (check \w+:.*)$", TEXT, re.MULTILINE)]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_every_example_has_a_command() -> None:
    assert len(MODULES) == 3
    assert {re.match(r"check (\w+):", command)[1] for command in COMMANDS} == MODULES.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(command), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "all passed" in printed and "failed" not in printed
    assert ("ignored" if "smooth" in command else "used") in printed


def test_a_prompt_without_a_colour_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "colour_reward:colour", "--size", "16", "--prompts", "a red house", "a car"]) == 2
    assert "'a car' names none of red, green, blue" in capsys.readouterr().err
