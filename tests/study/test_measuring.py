"""The prompts that a study measures."""

from pathlib import Path

import pytest

from fastnabla.config.presets import PRESETS
from fastnabla.prompts import prompts_of
from fastnabla.study.measuring import measured_prompts

CONFIG = PRESETS["testbed"][1]


def test_held_out_prompts_follow_those_of_the_run(tmp_path: Path):
    seen = prompts_of(CONFIG.prompts, CONFIG.evaluation.prompts, 0).texts
    file = tmp_path / "prompts.txt"
    file.write_text(f"a picture of a bear\n{seen[1]}\n")
    prompts = measured_prompts(CONFIG, str(file))
    prompts.check()
    assert prompts.texts == [*seen, "a picture of a bear"]
    assert (prompts.trained, prompts.evaluated) == (len(seen), range(len(seen), len(seen) + 1))


def test_without_held_out_prompts_those_of_the_run_remain():
    prompts = measured_prompts(CONFIG, None)
    prompts.check()
    own = prompts_of(CONFIG.prompts, CONFIG.evaluation.prompts, 0)
    assert prompts == own


def test_prompts_that_are_all_trained_on_are_refused(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text(prompts_of(CONFIG.prompts, CONFIG.evaluation.prompts, 0).texts[0] + "\n")
    with pytest.raises(ValueError, match=r"measurement\.held_out = .*: the runs train on all of these prompts"):
        measured_prompts(CONFIG, str(file))
    with pytest.raises(ValueError, match=r"measurement\.held_out = 'nowhere'"):
        measured_prompts(CONFIG, "nowhere")
