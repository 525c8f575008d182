"""Recording what was measured, and a study that goes on from its records. No network is trained or sampled."""

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastnabla.comparison.plan import LAST_FILE, PlannedRun
from fastnabla.study import __main__ as command
from fastnabla.study import recording, running
from fastnabla.study.parts import end_part, held_out_part, pretrained_part, scale_parts, shared_parts
from fastnabla.study.plan import ENDED_EARLY, Setting, StudyRun, final_runs, tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.recording import record_measured
from fastnabla.study.records import RunResult, read_records
from fastnabla.study.results import read_results
from fastnabla.study.samples import write_samples
from tests.study.made_up import TOML, made_samples, measure, protocol_file, train

pytestmark = pytest.mark.slow

OURS, THEIRS = Setting("ours", 1e-2), Setting("theirs", 3e-3)
SHIFTS = {Setting("ours", 1e-3): 0.2, OURS: 0.7, THEIRS: 0.9}
"""The learning rate 0.01 gains more, so it is chosen; some hue entropy may be lost."""
WIDE = TOML.replace("allowed_losses = [0.2]", "allowed_losses = [1.0]")


def planned(protocol: Protocol, folder: Path) -> list[StudyRun]:
    return [*tuning_runs(protocol, folder), *final_runs(protocol, folder, [OURS, THEIRS])]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Protocol, Path]:
    """The protocol's file, the protocol, and the folder of its study, whose runs have been measured and not recorded."""
    path = protocol_file(tmp_path, WIDE)
    protocol, folder = Protocol.read(path), tmp_path / "study"
    for run in planned(protocol, folder):
        train(run.planned)
        measure(run, protocol, folder, SHIFTS[run.setting])
    return path, protocol, folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Runs that are trained, and those for which the pretrained model is measured. All of this is made up."""
    names, folder = [], tmp_path / "study"

    def train_one(plans: Sequence[PlannedRun], *_: object) -> int:
        names.extend(plan.folder.name for plan in plans)
        for plan in plans:
            train(plan)
        return 0

    def measure_shared(run: StudyRun, protocol: Protocol, folder: Path, *_: object) -> None:
        missing = [part for part in shared_parts(run, protocol, folder) if not part.is_measured]
        names.extend([f"pretrained for {run.name}"] if missing else [])
        for part in missing:
            write_samples(part.path, made_samples(part, shift=0), part.key)

    monkeypatch.setattr(running, "train_all", train_one)
    monkeypatch.setattr(running, "measure_run", lambda run, protocol, _: measure(run, protocol, folder))
    monkeypatch.setattr(running, "measure_pretrained", measure_shared)
    return names


def page(path: Path) -> list[bytes]:
    """The contents of the page, its picture and the records."""
    return [
        path.with_name(name).read_bytes() for name in ("made-up.md", "made-up-hue_entropy.png", "made-up.runs.jsonl")
    ]


def test_the_page_from_records_is_that_from_folders(made: tuple[Path, Protocol, Path]):
    path, _, folder = made
    options = [str(path), "--run", str(folder), "--page-only"]
    assert command.main(options) == 0
    before = page(path)
    assert b"Incomplete" not in before[0] and b"[records of all runs](made-up.runs.jsonl)" in before[0]
    shutil.rmtree(folder)
    path.with_name("made-up.md").unlink()
    path.with_name("made-up-hue_entropy.png").unlink()
    assert command.main(options) == 0
    assert page(path) == before
    assert not folder.exists()


def test_records_hold_what_was_measured(made: tuple[Path, Protocol, Path]):
    path, protocol, folder = made
    results = read_results(protocol, folder, path.with_suffix(".runs.jsonl"))
    run = planned(protocol, folder)[-1]
    (result,) = results.of(run.setting).values()
    assert isinstance(result, RunResult) and (result.setting, result.seed) == (THEIRS, 0)
    part = end_part(run, protocol)
    assert result.end["reward"] == pytest.approx(part.read().measures.total.mean().item(), rel=5e-6)
    before = pretrained_part(part, folder).read().measures.total.mean().item()
    assert result.pretrained["reward"] == pytest.approx(before, rel=5e-6)
    assert [place.scale for place in result.path] == [0, 0.5, 1]
    assert result.path[2].measures["reward"] == pytest.approx(
        part.read().first(2).measures.total.mean().item(), rel=5e-6
    )
    held_out = held_out_part(run, protocol)
    ends = [each.read().measures.total.mean().item() for each in (held_out, pretrained_part(held_out, folder))]
    assert result.held_out["reward"] == pytest.approx(ends[0] - ends[1], rel=5e-6)
    assert (result.divergence, result.spent.updates) == (2.0, run.planned.config.updates)
    for each in results.tuned["ours"]:
        assert each.gain == pytest.approx(SHIFTS[each.setting], abs=0.1)  # uniform noise of width 0.1


def test_a_study_goes_on_without_its_folder(made: tuple[Path, Protocol, Path], trained: list[str]):
    path, _, folder = made
    options = [str(path), "--run", str(folder)]
    assert command.main([*options, "--page-only"]) == 0
    shutil.rmtree(folder)
    assert command.main(options) == 0
    assert trained == []

    before = page(path)
    file = path.with_suffix(".runs.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"name": "theirs"' not in line))
    assert command.main([*options, "--page-only"]) == 0
    assert (
        "1 of 2 final runs have been measured; missing are theirs,0.003-seed-0." in path.with_suffix(".md").read_text()
    )
    assert command.main([*options, "--only", "ours,0.01-seed-0"]) == 0
    assert trained == []
    assert command.main(options) == 0
    assert trained == ["pretrained for theirs,0.003-seed-0", "theirs,0.003-seed-0"]
    assert len(page(path)[2].splitlines()) == len(before[2].splitlines())


def test_a_run_that_was_killed_before_it_was_recorded_is_not_trained_again(
    made: tuple[Path, Protocol, Path], trained: list[str], monkeypatch: pytest.MonkeyPatch
):
    path, _, folder = made
    options = [str(path), "--run", str(folder)]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recording, "add_records", killed)
        assert command.main([*options, "--only", "theirs,0.003-seed-0"]) == 130
    assert read_records(path.with_suffix(".runs.jsonl")) == {}
    assert command.main(options) == 0
    assert trained == []
    assert len(read_records(path.with_suffix(".runs.jsonl"))) == 4


def test_runs_that_end_at_the_same_time_are_all_recorded(made: tuple[Path, Protocol, Path]):
    path, protocol, folder = made
    file = path.with_suffix(".runs.jsonl")
    runs = planned(protocol, folder)
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda run: record_measured([run], protocol, folder, file), runs))
    assert read_records(file).keys() == {run.name for run in runs}


def test_a_record_of_another_protocol_does_not_count(
    made: tuple[Path, Protocol, Path], trained: list[str], capsys: pytest.CaptureFixture
):
    path, _, folder = made
    options = [str(path), "--run", str(folder)]
    assert command.main([*options, "--page-only"]) == 0
    shutil.rmtree(folder)
    records = path.with_suffix(".runs.jsonl").read_bytes()
    protocol_file(
        path.parent, WIDE.replace("learning_rates = [3e-3]", 'learning_rates = [3e-3]\nsettings = { "direct.k" = "2" }')
    )
    capsys.readouterr()
    assert command.main([*options, "--page-only"]) == 0
    remark = "Records that do not count, because of another settings.direct.k: theirs,0.003-seed-0."
    text = path.with_suffix(".md").read_text()
    assert f"**{remark}**" in text and "missing are theirs,0.003-seed-0." in text
    assert remark in " ".join(capsys.readouterr().out.split())
    assert path.with_suffix(".runs.jsonl").read_bytes() == records  # kept until the run is recorded again

    assert command.main(options) == 0
    assert remark in " ".join(capsys.readouterr().out.split())
    assert trained == ["pretrained for theirs,0.003-seed-0", "theirs,0.003-seed-0"]
    assert "do not count" not in path.with_suffix(".md").read_text()
    assert len(read_records(path.with_suffix(".runs.jsonl"))) == 4


def test_records_of_runs_that_the_protocol_does_not_choose_are_named(made: tuple[Path, Protocol, Path]):
    path, _, folder = made
    options = [str(path), "--run", str(folder), "--page-only"]
    assert command.main(options) == 0
    records = path.with_suffix(".runs.jsonl").read_bytes()
    protocol_file(path.parent, WIDE.replace("[1e-3, 1e-2]", "[1e-3, 3e-3]"))
    assert command.main(options) == 0
    remark = "Records of runs that the protocol lacks or does not choose: ours,0.01-seed-0, ours,0.01-seed-7."
    assert remark in path.with_suffix(".md").read_text()
    assert path.with_suffix(".runs.jsonl").read_bytes() == records


def test_runs_that_diverged_are_recorded(made: tuple[Path, Protocol, Path], trained: list[str]):
    path, protocol, folder = made
    early, broken, *_ = planned(protocol, folder)
    (early.folder / LAST_FILE).unlink()
    (early.folder / ENDED_EARLY).write_text("")
    part = end_part(broken, protocol)
    samples = part.read()
    samples.measures.total[0] = float("nan")
    write_samples(part.path, samples, part.key)
    file = path.with_suffix(".runs.jsonl")
    records = record_measured([early, broken], protocol, folder, file)
    assert [record.result for record in records.values()] == [None, None]
    shutil.rmtree(folder)
    assert record_measured([early, broken], protocol, folder, file) == records
    assert read_results(protocol, folder, file).tuned == {}


def test_samples_of_a_scale_that_are_not_finite_are_recorded(made: tuple[Path, Protocol, Path]):
    """They have no measures, and the path of the run ends before them. The page is written."""
    path, protocol, folder = made
    run = planned(protocol, folder)[-1]
    (part,) = scale_parts(run, protocol)
    samples = part.read()
    for values in (samples.measures.total, samples.measures.hue, samples.measures.dark):
        values[0] = math.nan
    write_samples(part.path, samples, part.key)
    assert command.main([str(path), "--run", str(folder), "--page-only"]) == 0
    (result,) = read_results(protocol, folder, path.with_suffix(".runs.jsonl")).of(run.setting).values()
    nothing = {"reward", "hue_entropy", "joint_entropy", "dark_grounds"}
    assert [place.scale for place in result.path] == [0, 0.5, 1]
    assert {name for name, value in result.path[1].measures.items() if math.isnan(value)} == nothing
    assert all(map(math.isfinite, (*result.path[2].measures.values(), *result.end.values())))


def test_a_run_is_not_recorded_before_the_pretrained_model_is_measured(made: tuple[Path, Protocol, Path]):
    path, protocol, folder = made
    shutil.rmtree(folder / "pretrained")
    file = path.with_suffix(".runs.jsonl")
    assert record_measured(planned(protocol, folder), protocol, folder, file) == {}
    assert not file.exists()
