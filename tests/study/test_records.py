"""The file of a study's records."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from fastnabla.study.plan import Setting, StudyRun, final_runs, tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.records import (
    Record,
    TuningResult,
    add_records,
    key_differences,
    key_of,
    read_records,
    records_file,
    valid_records,
)
from tests.study.made_up import TOML, protocol_file, run_result

OURS = Setting("ours", 1e-3)
KEY = {"preset": "testbed", "settings": {"flow.kind": "none"}, "measurement": {"samples": 4, "scales": [0.5]}}
TUNED = Record(setting=OURS, seed=7, key=KEY, result=TuningResult(reward=0.123456789, hue_entropy=-1e-7 / 3))
DIVERGED = Record(setting=Setting("ours", 1e-2), seed=7, key=KEY, result=None)
FINAL = Record(setting=OURS, seed=0, key=KEY, result=run_result(OURS, 0, gain=1 / 3, loss=0.1))


def test_records_are_read_as_they_were_written_but_for_digits(tmp_path: Path):
    file = tmp_path / "made-up.runs.jsonl"
    add_records(file, [TUNED, DIVERGED, FINAL])
    read = read_records(file)
    assert list(read) == ["ours,0.001-seed-0", "ours,0.001-seed-7", "ours,0.01-seed-7"]  # sorted
    assert read["ours,0.01-seed-7"] == DIVERGED
    assert read["ours,0.001-seed-7"].result == TuningResult(reward=0.123457, hue_entropy=-3.33333e-08)
    final = read["ours,0.001-seed-0"]
    assert dataclasses.replace(final, result=None) == dataclasses.replace(FINAL, result=None)
    for a, b in zip(final.result.path, FINAL.result.path, strict=True):
        assert a.scale == b.scale
        assert a.measures == pytest.approx(b.measures, rel=5e-6)  # 6 significant digits
    assert final.result.end == pytest.approx(FINAL.result.end, rel=5e-6)
    assert final.result.spent == FINAL.result.spent

    before = file.read_bytes()
    add_records(file, read.values())
    assert file.read_bytes() == before


def test_numbers_that_are_not_finite_are_kept(tmp_path: Path):
    file = tmp_path / "made-up.runs.jsonl"
    add_records(file, [dataclasses.replace(FINAL, result=dataclasses.replace(FINAL.result, divergence=math.nan))])
    assert math.isnan(read_records(file)[FINAL.name].result.divergence)


def test_a_record_replaces_that_of_its_run_only(tmp_path: Path):
    file = tmp_path / "made-up.runs.jsonl"
    add_records(file, [TUNED, FINAL])
    again = dataclasses.replace(TUNED, result=None)
    add_records(file, [again])
    assert read_records(file)[TUNED.name] == again
    assert read_records(file).keys() == {TUNED.name, FINAL.name}


def test_there_are_no_records_without_a_file(tmp_path: Path):
    assert read_records(records_file(tmp_path / "made-up.toml")) == {}
    assert records_file(tmp_path / "made-up.toml").name == "made-up.runs.jsonl"


def damaged(**changes: object) -> str:
    """A line of which some values are changed, or removed if they are None."""
    values = {"name": "ours", "learning_rate": 0.1, "seed": 1, "key": {}, "result": None} | changes
    return json.dumps({name: value for name, value in values.items() if value is not None or name == "result"})


@pytest.mark.parametrize(
    "line",
    [
        "<<<<<<< HEAD",
        "",
        "[]",
        damaged()[:-5],
        damaged(key=None),
        damaged(key="testbed"),
        damaged(learning_rate="0.1"),
        damaged(seed="1"),
        damaged(result={"reward": 1.0}),
        damaged(result={"reward": 1.0, "hue_entropy": "-0.1"}),
        damaged(result={"path": {"scale": [0, 1], "reward": [1.0]}}),
        damaged(result={"path": {"scale": [0, 1], "reward": [1.0, 2.0]}, "end": {}}),
    ],
)
def test_a_damaged_line_is_named_and_kept(tmp_path: Path, line: str):
    file = tmp_path / "made-up.runs.jsonl"
    add_records(file, [TUNED])
    file.write_text(f"{file.read_text()}{line}\n")
    before = file.read_bytes()
    message = r"made-up\.runs\.jsonl', line 2: is damaged .* restore it, or remove it to measure its run again"
    with pytest.raises(ValueError, match=message):
        read_records(file)
    with pytest.raises(ValueError, match="line 2"):
        add_records(file, [FINAL])
    assert file.read_bytes() == before


def test_a_run_with_two_lines_is_named(tmp_path: Path):
    file = tmp_path / "made-up.runs.jsonl"
    add_records(file, [TUNED])
    file.write_text(file.read_text() * 2)
    with pytest.raises(ValueError, match=r"line 2: ours,0\.001-seed-7 has two lines; remove one"):
        read_records(file)


def runs_of(folder: Path, text: str = TOML) -> tuple[Protocol, StudyRun, StudyRun]:
    """The protocol and its first tuning and final run."""
    protocol = Protocol.read(protocol_file(folder, text))
    return protocol, tuning_runs(protocol, folder)[0], final_runs(protocol, folder, [OURS])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "tuning", "final"),
    [
        ("note", "note", [], []),
        ("passes = 88.0", "passes = 500.0", ["passes"], ["passes"]),
        ('"sampler.steps" = "4"', '"sampler.steps" = "6"', ["settings.sampler.steps"], ["settings.sampler.steps"]),
        ('{ "flow.kind" = "none" }', "{}", ["settings.flow.kind"], ["settings.flow.kind"]),
        ("[tuning]\nseeds = [7]\nsamples = 2", "[tuning]\nseeds = [7]\nsamples = 3", ["measurement.samples"], []),
        ("samples = 4\nreference_samples = 4", "samples = 5\nreference_samples = 4", [], ["measurement.samples"]),
        ("scales = [0.5]", "scales = [0.5, 2.0]", [], ["measurement.scales"]),
        ("divergence_samples = 2", "divergence_samples = 3", [], ["measurement.divergence_samples"]),
        ("seeds = [0]", "seeds = [0, 1]", [], []),
        ("gain = 0.5", "gain = 0.6", [], []),
    ],
)
def test_a_record_counts_while_the_protocol_says_the_same_of_its_run(
    tmp_path: Path, old: str, new: str, tuning: list[str], final: list[str]
):
    assert old in TOML
    before, after = runs_of(tmp_path), runs_of(tmp_path, TOML.replace(old, new, 1))
    for place, names in ((1, tuning), (2, final)):
        keys = [json.loads(json.dumps(key_of(runs[place], runs[0]))) for runs in (before, after)]
        assert key_differences(*keys) == names
        run = after[place]
        record = Record(setting=run.setting, seed=run.seed, key=keys[0], result=None)
        assert valid_records([run], after[0], {record.name: record}) == ({} if names else {run.name: record})


@pytest.mark.slow
def test_the_order_of_scales_does_not_matter(tmp_path: Path):
    orders = [runs_of(tmp_path, TOML.replace("[0.5]", text)) for text in ("[0.5, 2.0]", "[2.0, 0.5]")]
    assert key_of(orders[0][2], orders[0][0]) == key_of(orders[1][2], orders[1][0])


def test_a_change_of_the_preset_is_seen(tmp_path: Path):
    protocol, run, _ = runs_of(tmp_path)
    config = dataclasses.replace(run.planned.config, max_skipped=1)  # without effect
    same = dataclasses.replace(run, planned=dataclasses.replace(run.planned, config=config))
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=3))
    changed = dataclasses.replace(run, planned=dataclasses.replace(run.planned, config=config))
    key = key_of(run, protocol)
    assert key_differences(key, key_of(same, protocol)) == []
    assert key_differences(key, key_of(changed, protocol)) == ["configuration"]
