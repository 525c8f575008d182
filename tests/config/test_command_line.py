"""Error messages and help texts of the command lines."""

import contextlib
import io

import pytest

from fastnabla.rewards.__main__ import main as rewards
from fastnabla.train import parse

INVALID = [
    (parse, ["testbed", "--sampler.guidance-scale", "0"], "sampler.guidance_scale = 0.0: must be positive and finite; use 1"),
    (parse, ["stable-diffusion", "--sampler.guidance-scale=-1"], "use 1 for no guidance"),
    (parse, ["testbed", "--sampler.steps", "25", "--rollout.fraction", "0.1"], "use 0.04 or 0.2, or --rollout.draw uniform"),
    (parse, ["testbed", "--sampler.steps", "3"], "use at least 0.4"),
    (parse, ["testbed", "--seed", "-1"], "seed = -1"),
    (parse, ["testbed", "--updates"], "--updates"),
    (parse, ["testbed", "--method", "sft"], "--method"),
    (parse, ["testbed", "--learning_rate=1"], "did you mean --flow.learning-rate or --optimizer.learning-rate?"),
    (parse, ["--steps", "4"], "did you mean --sampler.steps?"),
    (parse, ["stable-difusion", "--updates", "2"], "stable-diffusion"),
    (parse, ["sd15", "testbed", "--seed", "-1"], ""),
    (rewards, ["check"], "spec"),
    (rewards, ["check", "area", "--batch", "1"], "batch = 1"),
    (rewards, ["check", "area", "--size", "x"], "--size"),
    (rewards, ["cheque"], "check"),
    (rewards, [], "check"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "said"), INVALID, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_errors_are_without_the_parser_s_own_names(command, arguments: list[str], said: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            assert command(arguments) == 2
        except SystemExit as ended:
            assert ended.code == 2
        except ValueError as error:
            print(error)
    words = " ".join(printed.getvalue().replace("│", " ").split())
    assert said in words
    assert "tyro" not in words and "dummy" not in words


@pytest.mark.parametrize("command", [parse, rewards], ids=["train", "rewards"])
@pytest.mark.parametrize("arguments", [["--help"], ["-h"]], ids=" ".join)
def test_help_is_without_them_too(command, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(arguments)
    printed = capsys.readouterr().out
    assert "usage" in printed and "tyro" not in printed and "dummy" not in printed


@pytest.mark.parametrize("method", ["draft", "draft-lv", "refl"])
@pytest.mark.parametrize(("preset", "steps"), [("testbed", "4"), ("stable-diffusion", "25"), ("stable-diffusion", "2")])
def test_few_steps_of_methods_that_draw_none(method: str, preset: str, steps: str) -> None:
    """`rollout.fraction`, which leaves nothing of 4 steps, has no part in them."""
    assert parse([preset, "--method", method, "--sampler.steps", steps]).sampler.steps == int(steps)


def test_two_dashes_before_options_are_dropped() -> None:
    assert parse(["--", "--updates", "4"]) == parse(["testbed", "--", "--updates", "4"]) == parse(["--updates", "4"])
