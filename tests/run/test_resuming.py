"""Which run a command line goes on with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastnabla.config.presets import PRESETS
from fastnabla.config.renamed import RENAMED
from fastnabla.config.train import TrainConfig, from_json, to_json
from fastnabla.config.training_sections import ComputeConfig
from fastnabla.prompts import RunPrompts
from fastnabla.run.resuming import (
    AUTO,
    BEFORE_CONFIGURATION,
    INTRODUCED,
    WITHOUT_EFFECT,
    fingerprint,
    flat,
    is_unbegun,
    run_to_resume,
)

PRESET = PRESETS["testbed"][1]
BASE = dataclasses.replace(
    PRESET,
    memory=dataclasses.replace(PRESET.memory, micro_batch=8),
    objective=dataclasses.replace(PRESET.objective, reverse_fraction=1.0),
    compute=ComputeConfig(),
    evaluation=dataclasses.replace(PRESET.evaluation, every=6),
)
"""The testbed's preset as it was in the version before."""
FINGERPRINTS = {
    False: "b54500fc3975a4fd127ed6d1c206502aa3036482c75293005b1253aedbe6c3e2",
    True: "b3f5c1595180c2a9f7967e9bcc13b4ac83f592e1cef977a5b8467655d787ff79",
}
"""Of `BASE`, by reward.tf32, which was in place of reward.precision: what the version before computed."""
PROMPTS = RunPrompts(texts=["a cow", "a dog"], trained=1, evaluated=range(1, 2))


def begun(run: Path, config: TrainConfig) -> None:
    run.mkdir()
    (run / "config.json").write_text(to_json(config))


def test_the_fingerprint_is_of_what_results_depend_on(tmp_path: Path) -> None:
    changed = dataclasses.replace(
        BASE,
        run=tmp_path,
        resume=AUTO,
        dry_run=True,
        vram=3.0,
        tracker="none",
        checkpoint_every=3,
        checkpoint_keep=9,
        hang_timeout=9.0,
    )
    bounded = dataclasses.replace(BASE.evaluation, stop_below_diversity=0.5, stop_above_prior=3.0)
    changed = dataclasses.replace(changed, evaluation=bounded)
    own = fingerprint(BASE, PROMPTS)
    assert fingerprint(changed, PROMPTS) == own == fingerprint(from_json(to_json(BASE)), PROMPTS)
    assert set(WITHOUT_EFFECT) <= flat(BASE).keys()
    for other in (
        dataclasses.replace(BASE, seed=1),
        dataclasses.replace(BASE, memory=dataclasses.replace(BASE.memory, micro_batch=3)),
        dataclasses.replace(BASE, lora=dataclasses.replace(BASE.lora, targets=("to_q",))),
    ):
        assert fingerprint(other, PROMPTS) != own
    for prompts in (
        dataclasses.replace(PROMPTS, texts=["a cow", "a hog"]),
        dataclasses.replace(PROMPTS, trained=2),
        dataclasses.replace(PROMPTS, evaluated=range(2)),
    ):
        assert fingerprint(BASE, prompts) != own


@pytest.mark.parametrize(("tf32", "precision"), [(False, "float32"), (True, "tf32")])
def test_a_run_of_the_version_before_is_resumed(tf32: bool, precision: str, tmp_path: Path) -> None:
    """Its checkpoints have the fingerprint that it computed. A field that you add: name it in `resuming.INTRODUCED`."""
    values = json.loads(to_json(BASE))
    for name in INTRODUCED:
        section, _, field = name.rpartition(".")
        del (values[section] if section else values)[field]
    for name, renamed in RENAMED.items():
        section, _, field = name.partition(".")
        value = values[section].pop(renamed.name.partition(".")[2])
        values[section][field] = value if renamed.values is None else tf32
    own = from_json(json.dumps(values))
    reward, sampler = BASE.reward, dataclasses.replace(BASE.sampler, spacing=None)  # the checkpoint's spacing
    assert own == dataclasses.replace(BASE, reward=dataclasses.replace(reward, precision=precision), sampler=sampler)
    assert fingerprint(own, PROMPTS) == FINGERPRINTS[tf32]
    assert fingerprint(BASE, PROMPTS) not in FINGERPRINTS.values()  # computed in what the device has
    run = tmp_path / "run"
    begun(run, BASE)
    (run / "config.json").write_text(json.dumps(values))
    assert run_to_resume(dataclasses.replace(BASE, resume=AUTO, run=run)) == (run, [])
    other = dataclasses.replace(BASE, resume=AUTO, run=run, reward=dataclasses.replace(BASE.reward, precision="bf16"))
    with pytest.raises(ValueError, match=rf"reward\.precision = '{precision}', not 'bf16'"):
        run_to_resume(other)
    trailing = dataclasses.replace(BASE.sampler, spacing="trailing")
    with pytest.raises(ValueError, match=r"sampler\.spacing = None, not 'trailing'"):
        run_to_resume(dataclasses.replace(BASE, resume=AUTO, run=run, sampler=trailing))


def test_a_null_spacing_of_an_older_version_stays() -> None:
    values = json.loads(to_json(BASE))
    values["sampler"]["spacing"] = None
    own = from_json(json.dumps(values))
    assert own.sampler.spacing is None and fingerprint(own, PROMPTS) != fingerprint(BASE, PROMPTS)
    assert from_json(to_json(BASE)).sampler.spacing == "leading"


@pytest.mark.parametrize("tf32", [None, 1, "true"])
def test_other_values_of_the_old_name_are_refused(tf32: Any) -> None:
    values = json.loads(to_json(BASE))
    values["reward"] |= {"tf32": tf32}
    with pytest.raises(ValueError, match=r"reward\.tf32: no such field"):
        from_json(json.dumps(values))


def test_without_resume_a_run_starts() -> None:
    assert run_to_resume(BASE) is None


def test_a_named_run_is_resumed_whatever_else_is_said(tmp_path: Path) -> None:
    assert run_to_resume(dataclasses.replace(BASE, resume=tmp_path, seed=5)) == (tmp_path, [])


def test_auto_needs_a_run() -> None:
    with pytest.raises(ValueError, match="resume = 'auto': needs"):
        dataclasses.replace(BASE, resume=AUTO)


def test_auto_starts_what_is_not_there_or_was_not_begun(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, resume=AUTO, run=tmp_path / "run")
    assert run_to_resume(config) is None and not is_unbegun(config.run)
    config.run.mkdir()
    for name in (None, *sorted(BEFORE_CONFIGURATION)):
        if name is not None:
            (config.run / name).touch()
        assert run_to_resume(config) is None and is_unbegun(config.run)
    (config.run / "notes.txt").touch()
    assert run_to_resume(config) is None and not is_unbegun(config.run)


def test_auto_continues_what_was_begun(tmp_path: Path) -> None:
    begun(tmp_path / "run", dataclasses.replace(BASE, run=Path("elsewhere")))
    config = dataclasses.replace(BASE, resume=AUTO, run=tmp_path / "run")
    assert run_to_resume(config) == (config.run, [])
    planned = dataclasses.replace(config, memory=dataclasses.replace(config.memory, micro_batch=None))
    assert run_to_resume(planned) == (config.run, [])
    run, notes = run_to_resume(dataclasses.replace(config, tracker="none"))
    assert run == config.run and notes == [f"tracker = 'none' is ignored: the run has {BASE.tracker!r}"]


def test_auto_refuses_another_configuration_field_by_field(tmp_path: Path) -> None:
    begun(tmp_path / "run", BASE)
    config = dataclasses.replace(BASE, resume=AUTO, run=tmp_path / "run", seed=7, updates=2 * BASE.updates)
    with pytest.raises(
        ValueError, match=rf"seed = 0, not 7, updates = {BASE.updates}, not {2 * BASE.updates}\. Use.*'linear'"
    ):
        run_to_resume(config)
