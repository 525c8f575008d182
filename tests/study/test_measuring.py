"""The prompts that a study measures, and who measures the pretrained model."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastnabla.config.presets import PRESETS
from fastnabla.prompts import prompts_of
from fastnabla.study import measuring
from fastnabla.study.measuring import measure_pretrained, measured_prompts
from fastnabla.study.parts import Part, shared_parts
from fastnabla.study.plan import tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.samples import Samples
from tests.study.made_up import made_samples, protocol_file

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


def test_one_run_of_a_seed_measures_the_pretrained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three that end at the same time: the others wait, and find it done."""
    protocol, measured = Protocol.read(protocol_file(tmp_path)), []

    def measure(part: Part, _: Callable[[int], None]) -> Samples:
        time.sleep(0.1)
        measured.append(part.path)
        return made_samples(part, shift=0)

    progress = contextlib.nullcontext(SimpleNamespace(advance=None))
    networks = SimpleNamespace(measure=measure, progress=lambda *_: progress)
    monkeypatch.setattr(measuring, "_Networks", lambda *_: networks)
    runs = tuning_runs(protocol, tmp_path)
    (part,) = shared_parts(runs[0], protocol, tmp_path)
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda run: measure_pretrained(run, protocol, tmp_path, Console(quiet=True)), runs))
    assert len(runs) > 1 and measured == [part.path] and part.is_measured
