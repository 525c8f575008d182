"""A tiny study, from the command line to the page."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastnabla.metrics.pixels import PixelProbe
from fastnabla.study import __main__ as command
from fastnabla.study.parts import end_part, pretrained_part, scale_parts
from fastnabla.study.plan import Setting, final_runs, tuning_runs
from fastnabla.study.protocol import Protocol
from fastnabla.study.results import read_results
from tests.runs import smallest
from tests.study.made_up import TOML, protocol_file

pytestmark = pytest.mark.slow


class BrightProbe(PixelProbe):
    """Calls bright images correct."""

    def is_correct(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3)) > 0.5


def on_smallest(text: str) -> str:
    """The protocol `text` with a model of one level in place of the testbed."""
    changes = {"model.name": smallest("sd15"), "model.height": "8", "model.width": "8", "reward.terms": "hue=1"}
    changes |= {"evaluation.probe": "tests.study.test_study:BrightProbe"}
    settings = ", ".join(f'"{name}" = "{value}"' for name, value in changes.items())
    return text.replace("settings = { ", f"settings = {{ {settings}, ", 1)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Protocol, Path]:
    """The protocol and the folder of a finished study."""
    folder = tmp_path_factory.mktemp("study")
    path = protocol_file(folder, on_smallest(TOML))
    assert command.main([str(path), "--run", str(folder / "runs of it")]) == 0
    return Protocol.read(path), folder / "runs of it"


def settings(done: tuple[Protocol, Path]) -> list[Setting]:
    protocol, folder = done
    return list(read_results(protocol, folder, folder.parent / "made-up.runs.jsonl").settings)


def test_tuning_comes_first_and_chosen_settings_get_fresh_seeds(done: tuple[Protocol, Path]):
    protocol, folder = done
    chosen = settings(done)
    names = {run.folder.name for run in (*tuning_runs(protocol, folder), *final_runs(protocol, folder, chosen))}
    assert {path.name for path in (folder / "runs").iterdir()} == names
    assert {f"ours,{rate}-seed-7" for rate in ("0.001", "0.01")} < names
    assert {setting.name for setting in chosen} == {"ours", "theirs"}
    assert names >= {f"{setting}-seed-0" for setting in chosen}
    assert len(names) == 2 + 2


def test_runs_are_evaluated_at_the_end_only(done: tuple[Protocol, Path]):
    protocol, folder = done
    for run in final_runs(protocol, folder, settings(done)):
        records = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        evaluated = [record["update"] for record in records if record["phase"] == "evaluate"]
        assert evaluated == [0, run.planned.config.updates]


def test_noise_is_shared_by_methods_and_scales_but_not_by_seeds(done: tuple[Protocol, Path]):
    protocol, folder = done
    run, other_method = final_runs(protocol, folder, settings(done))
    parts = [end_part(each, protocol) for each in (run, other_method, tuning_runs(protocol, folder)[0])]
    before, same, other = (pretrained_part(part, folder) for part in parts)
    assert before == same and before.seed != other.seed
    before, other = before.read().first(2), other.read()
    assert not torch.equal(before.measures.total, other.measures.total)
    # Three updates change the samples a little, and half the LoRA changes them less.
    ends = [end_part(run, protocol).read().first(2), scale_parts(run, protocol)[0].read()]
    changes = [(end.measures.pixels - before.measures.pixels).norm().item() for end in ends]
    assert 0 < changes[1] < changes[0] < 0.5 * (other.measures.pixels - before.measures.pixels).norm().item()


def test_the_page_and_its_picture_are_beside_the_protocol(done: tuple[Protocol, Path]):
    protocol, folder = done
    text = (folder.parent / "made-up.md").read_text()
    assert "Incomplete" not in text
    for setting in settings(done):
        assert f"\n| {setting} " in text
    for measure in protocol.claims.measures:
        assert (folder.parent / f"made-up-{measure}.png").exists()


def test_what_a_run_has_spent_is_recorded(done: tuple[Protocol, Path]):
    protocol, folder = done
    results = read_results(protocol, folder, folder.parent / "made-up.runs.jsonl")
    assert len(results.runs) == 2
    for run in results.runs:
        assert run.held_out.keys() >= {"reward", "accuracy"}
        assert 0 < run.spent.passes <= protocol.passes and run.spent.decodes > 0 and run.spent.seconds > 0


def test_the_same_command_trains_and_measures_nothing_again(done: tuple[Protocol, Path], capsys: pytest.CaptureFixture):
    _, folder = done
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert command.main([str(folder.parent / "made-up.toml"), "--run", str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == files


def test_a_missing_measurement_is_named_and_made_again(done: tuple[Protocol, Path]):
    protocol, folder = done
    run = final_runs(protocol, folder, settings(done))[0]
    part = scale_parts(run, protocol)[0]
    before = part.path.read_bytes()
    part.path.unlink()
    (folder.parent / "made-up.runs.jsonl").unlink()
    options = [str(folder.parent / "made-up.toml"), "--run", str(folder)]
    assert command.main([*options, "--page-only"]) == 0
    assert (
        f"1 of 2 final runs have been measured; missing are {run.folder.name}."
        in (folder.parent / "made-up.md").read_text()
    )
    shared = pretrained_part(part, folder).path.parent
    shutil.rmtree(shared)
    assert command.main([*options, "--only", run.folder.name]) == 0
    assert part.path.read_bytes() == before and any(shared.iterdir())
    assert f'"name": "{run.setting.name}"' in (folder.parent / "made-up.runs.jsonl").read_text()


def test_results_of_another_protocol_are_refused(
    done: tuple[Protocol, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    _, folder = done
    changed = protocol_file(tmp_path, on_smallest(TOML).replace("passes = 88.0", "passes = 500.0"))
    assert command.main([str(changed), "--run", str(folder), "--page-only"]) == 2
    assert "has another configuration: updates" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"flow.kind" = "none"', '"direct.k" = "2"', "residual-db does not use direct.k"),
        ('"flow.kind" = "none"', '"sampler.steps" = "2"', "sampler.steps must be the same for all methods"),
        ('"flow.kind" = "none"', '"seed" = "2"', "seed is set by the comparison"),
        ('"flow.kind" = "none"', '"lora.rank" = "0"', "lora.rank = 0: a study scales the LoRA"),
        ('"flow.kind" = "none"', '"optimizer.learning-rate" = "1"', "are set by methods.learning_rates"),
    ],
)
def test_settings_that_would_be_unfair_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, old: str, new: str, message: str
):
    assert command.main([str(protocol_file(tmp_path, TOML.replace(old, new))), "--dry-run"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_unknown_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command.main([str(protocol_file(tmp_path)), "--only", "ours,3-seed-0"]) == 2
    assert "only = 'ours,3-seed-0'" in " ".join(capsys.readouterr().err.split())
