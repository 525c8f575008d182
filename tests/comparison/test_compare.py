"""Tiny comparisons, from the command line to the page."""

import dataclasses
import html
import json
import os
import re
import shlex
import signal
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastnabla import compare
from fastnabla.comparison import evaluations, training
from fastnabla.comparison.plan import PlannedRun, make_plan
from fastnabla.comparison.training import train_in_processes
from fastnabla.evaluation.options import EvaluationOptions
from fastnabla.optim.optimizer import Optimizer
from fastnabla.training.guards import Guard
from fastnabla.training.trainer import Trainer
from tests.faults import assert_same_result
from tests.runs import smallest

pytestmark = pytest.mark.slow

PROMPTS = ["a giraffe", "a <b>cow</b> & more"]
ODD = "<i>odd & bold"
BUDGET = 88
"""U. With the sizes below: two updates of residual ∇-DB with 38 U each, on average; eight of DRaFT with 10 U each."""
SETTINGS = (
    "model.height=8",
    "model.width=8",
    "reward.terms=hue=1",
    "evaluation.probe=pixels",
    "sampler.steps=4",
    "rollout.trajectories=2",
    "rollout.fraction=0.5",
    "evaluation.samples=2",
    "evaluation.prompts=2",
    "optimizer.warmup=1",
    "objective.reward_gradient=lookahead",
    "objective.reverse-fraction=1",
    "tracker=none",
    "draft.checkpoint-every=2",
)


def command(folder: Path, *options: str) -> list[str]:
    prompts = folder.parent / "prompts.txt"
    prompts.parent.mkdir(exist_ok=True)
    prompts.write_text("\n".join(PROMPTS) + "\n")
    settings = [*SETTINGS, f"model.name={smallest('sd15')}", f"prompts.source={shlex.quote(str(prompts))}"]
    return [
        "--methods", "residual-db", "draft", "--run", str(folder), f"--passes={BUDGET}", "--points=2", *options,
        "--set", *settings,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two methods, two seeds each."""
    folder = tmp_path_factory.mktemp("comparisons") / ODD / "comparison"
    assert compare.main(command(folder, "--seeds=2")) == 0
    return folder


def values(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of all files of the runs."""
    files = [path for path in folder.glob("*-seed-*/**/*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_every_run_is_an_ordinary_one_and_spends_the_budget(done: Path) -> None:
    found = values(done)
    assert [(run["folder"], run["updates"], run["planned_passes"]) for run in found["runs"]] == [
        ("residual-db-seed-0", 2, 76),
        ("draft-seed-0", 8, 80),
        ("residual-db-seed-1", 2, 76),
        ("draft-seed-1", 8, 80),
    ]
    assert found["passes"] == BUDGET
    points = [(p["variant"], p["seed"], p["update"], p["transitions"]) for p in found["points"]]
    assert points == [
        row
        for seed in (0, 1)
        for row in (
            *(("residual-db", seed, update, 6 * update) for update in (0, 1, 2)),
            *(("draft", seed, update, 2 * update) for update in (0, 4, 8)),
        )
    ]
    assert all(p["passes"] == spent(done, p["variant"], p["seed"], p["update"]) for p in found["points"])
    assert all(p["trajectories"] == 2 * p["update"] for p in found["points"])
    assert all((p["seconds"] > 0) == (p["update"] > 0) for p in found["points"])
    for run in found["runs"]:
        assert (done / run["folder"] / "lora/pytorch_lora_weights.safetensors").is_file()


def spent(folder: Path, method: str, seed: int, updates: int) -> int:
    """U of a run's first `updates`. DRaFT: 4 + 1 per trajectory. Residual ∇-DB: 4 per trajectory, 7 or 3 per transition."""
    if method == "draft":
        return 2 * updates * (4 + 1)
    lines = (folder / f"{method}-seed-{seed}" / "metrics.jsonl").read_text().splitlines()
    records = [
        record for record in map(json.loads, lines) if record["phase"] == "train" and record["update"] <= updates
    ]
    assert all(record["rows_inner"] + record["rows_last"] == 6 for record in records)
    return sum(2 * 4 + 7 * record["rows_inner"] + 3 * record["rows_last"] for record in records)


def test_methods_begin_at_the_same_samples(done: Path) -> None:
    starts = [point for point in values(done)["points"] if point["update"] == 0]
    by_seed = {seed: [s["metrics"] for s in starts if s["seed"] == seed] for seed in (0, 1)}
    assert all(len(metrics) == 2 and metrics[0] == metrics[1] for metrics in by_seed.values())
    assert by_seed[0][0] != by_seed[1][0]


def test_points_are_what_the_runs_have_logged(done: Path) -> None:
    for run in values(done)["runs"]:
        lines = [json.loads(line) for line in (done / run["folder"] / "metrics.jsonl").read_text().splitlines()]
        logged = [
            {k: v for k, v in line.items() if k not in ("phase", "update")}
            for line in lines
            if line["phase"] == "evaluate"
        ]
        own = [
            p["metrics"] for p in values(done)["points"] if (p["variant"], p["seed"]) == (run["variant"], run["seed"])
        ]
        assert own == logged and len(own) == 3


def test_the_page_holds_everything_and_escapes_all_text(done: Path) -> None:
    text = (done / "comparison.html").read_text(encoding="utf-8")
    found = Elements(text)
    assert found.tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "ul", "li", "div", "table", "caption",
        "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption",
    }  # fmt: skip
    assert html.escape(PROMPTS[1]) in text and html.escape(f"{ODD}/prompts.txt") in text
    assert PROMPTS[1] not in text and ODD not in text
    assert len(found.sources) == 4  # two plots; a grid of each method
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    markdown = (done / "comparison.md").read_text(encoding="utf-8")
    for method in ("pretrained", "residual-db", "draft"):
        assert markdown.count(f"\n| {method} |") == 2
    for name in ("comparison-reward.png", "comparison-fronts.png"):
        assert (done / name).read_bytes().startswith(b"\x89PNG")
    assert not list(done.glob(".*.partial"))


class Elements(HTMLParser):
    """Tags and image sources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources = set(), []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name == "src"]


def test_the_same_command_again_trains_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, written = contents(done), (done / "comparison.json").read_bytes()
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("a run is built again"))
    assert compare.main(command(done, "--seeds=2")) == 0
    assert contents(done) == before
    assert (done / "comparison.json").read_bytes() == written


def test_another_configuration_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(done)
    assert compare.main([*command(done, "--seeds=2"), "draft.direct.k=2"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "direct.k = 1, not 2" in message and "draft-seed-0" in message and "another --run" in message
    assert contents(done) == before


def test_an_interrupted_comparison_goes_on(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in DRaFT's fifth update and continued, the runs equal those of the uninterrupted comparison bit for bit."""
    monkeypatch.setattr(Trainer, "_write_pictures", _no_pictures)
    folder, update, calls = tmp_path / "stopped", Optimizer.update, []
    arguments = command(folder, "--seeds=1")

    def stopping(*given):
        calls.append(None)
        if len(calls) == 2 + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "update", stopping)
        assert compare.main(arguments) == 128 + signal.SIGTERM
    assert len(calls) == 7
    so_far = values(folder)
    assert {point["variant"] for point in so_far["points"]} == {"residual-db"}
    assert so_far["remarks"] == ["draft-seed-0 has not ended."]
    assert "draft-seed-0 has not ended." in (folder / "comparison.html").read_text(encoding="utf-8")
    first = (folder / "residual-db-seed-0/metrics.jsonl").stat().st_mtime_ns
    assert compare.main(arguments) == 0
    assert (folder / "residual-db-seed-0/metrics.jsonl").stat().st_mtime_ns == first
    for run in ("residual-db-seed-0", "draft-seed-0"):
        assert (folder / run / "metrics.jsonl").read_bytes() == (done / run / "metrics.jsonl").read_bytes()
    ours, theirs = ([p for p in values(f)["points"] if p["seed"] == 0] for f in (folder, done))
    assert [p | {"seconds": 0} for p in ours] == [p | {"seconds": 0} for p in theirs]
    assert all((p["seconds"] > 0) == (p["update"] > 0) for p in ours)


def test_a_run_that_diverges_does_not_end_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first method's loss is not finite from its second update on. The other trains, and the page says so."""
    folder, calls, accepts = tmp_path / "diverging", [], Guard.accepts

    def diverging(self, update: int, report, norms) -> bool:
        calls.append(update)
        if len(calls) == 2:
            report = dataclasses.replace(report, losses=report.losses | {"loss": torch.tensor(float("nan"))})
        return accepts(self, update, report, norms)

    monkeypatch.setattr(Guard, "accepts", diverging)
    assert compare.main([*command(folder, "--seeds=1"), "max_skipped=1"]) == 0
    found = values(folder)
    assert [point["update"] for point in found["points"] if point["variant"] == "residual-db"] == [0, 1]
    assert max(point["update"] for point in found["points"] if point["variant"] == "draft") == 8
    assert found["remarks"] == ["residual-db-seed-0 ended early; its last evaluation is after 1 updates."]


def test_processes_get_commands_that_train_the_same_runs(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first process is told to do is done in this one, for speed, while the process itself does a dry run. The second
    would do as the first, and copies its run."""
    folder, start, commands = tmp_path / "processes", training._start, []

    def started(run: PlannedRun, command: list[str], *others):
        commands.append(command)
        if len(commands) == 1:
            assert compare.main(command[3:]) == 0
            return start(run, [*command, "--dry-run"], *others)
        return start(run, ["cp", "-r", str(done / run.folder.name), str(run.folder)], *others)

    monkeypatch.setattr(training, "_start", started)
    arguments = [*command(folder, "--seeds=2", "--jobs=2"), "--methods", "draft"]
    assert compare.main(arguments) == 0
    runs = ("draft-seed-0", "draft-seed-1")
    assert commands == [[sys.executable, "-m", "fastnabla.compare", *arguments, "--only", run] for run in runs]
    assert_same_result(folder / runs[0], done / runs[0])
    assert "U per run" in (folder / f"{runs[0]}.log").read_text(encoding="utf-8")
    assert [run["folder"] for run in values(folder)["runs"]] == list(runs) and values(folder)["remarks"] == []


def test_a_process_that_fails_ends_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_plan("testbed", ["residual-db", "draft"], 1, tmp_path).runs
    sleeping = [sys.executable, "-c", "import time; time.sleep(100)"]
    failing = [sys.executable, "-c", "raise SystemExit(7)"]
    commands, ended = {run[0].folder: sleeping, run[1].folder: failing}, []
    started = time.monotonic()
    assert train_in_processes(run, 2, lambda each: commands[each.folder], Console(), ended.append) == 7
    assert time.monotonic() - started < 50 and ended == []
    assert "ended with status 7" in " ".join(capsys.readouterr().out.split())


def test_processes_share_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer runs than jobs, there are as many processes as runs."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    runs = make_plan("testbed", ["residual-db", "draft"], 1, tmp_path).runs
    printing = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    assert train_in_processes(runs, 8, lambda _: printing, Console(quiet=True), lambda _: None) == 0
    assert [(tmp_path / f"{run.folder.name}.log").read_text() for run in runs] == ["8\n", "8\n"]


def test_only_trains_the_runs_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "only"
    assert compare.main(command(folder, "--seeds=1", "--only=draft-seed-0")) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["draft-seed-0"]
    assert compare.main(command(folder, "--seeds=1", "--only=draft-seed-1")) == 2
    assert "only = 'draft-seed-1': the runs are residual-db-seed-0, draft-seed-0." in capsys.readouterr().err


def _no_pictures(self, records: list, columns: dict) -> None:
    (self.folder / "samples").mkdir(exist_ok=True)
    (self.folder / "samples" / f"update-{records[-1]['update']:04d}.png").write_bytes(b"\x89PNG")


def test_evaluations_are_made_once_and_share_reference_samples(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, evaluate_run = [], evaluations.evaluate_run

    def counted(run: Path, *arguments):
        made.append(run.name)
        return evaluate_run(run, *arguments)

    monkeypatch.setattr(evaluations, "evaluate_run", counted)
    target = ["--target.samples-per-prompt=2", "--target.reference-samples=8", "--target.ess=0.25"]
    arguments = command(done, "--seeds=2", "--evaluate", *target)
    assert compare.main(arguments) == 0
    assert made == [run["folder"] for run in values(done)["runs"]]
    assert len(list(done.glob("*/reference-*.safetensors"))) == 1
    assert compare.main(arguments) == 0
    assert len(made) == 4

    found = [json.loads((done / name / "evaluation.json").read_text()) for name in made]
    assert values(done)["evaluations"] == {"residual-db": found[::2], "draft": found[1::2]}
    gaps = [result["groups"]["trained"]["targets"]["tilted"]["finetuned"]["reward_gap"] for result in found[1::2]]
    text = f" → {sum(gaps) / 2:.3g} ("
    for name in ("comparison.md", "comparison.html"):
        written = (done / name).read_text(encoding="utf-8")
        assert "Distances from the tilted target, training prompts" in written and text in written

    options = EvaluationOptions(samples_per_prompt=2, reference_samples=8, ess=0.25)
    run = done / made[0]
    assert evaluations.stored_evaluation(run, options) == found[0]
    assert evaluations.stored_evaluation(run, dataclasses.replace(options, seed=1)) is None
    monkeypatch.setattr(evaluations, "FORMAT", evaluations.FORMAT + 1)
    assert evaluations.stored_evaluation(run, options) is None, "results of another version"


def test_weights_that_runs_will_not_have_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(command(tmp_path / "averages", "--evaluate", "--target.weights=ema")) == 2
    assert "weights = 'ema': the run" in capsys.readouterr().err and not (tmp_path / "averages").exists()


def test_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is the preset's 24 updates of residual ∇-DB on 64 trajectories of 20 steps each. Of the 5 transitions that are
    drawn of each, on average 3.8 are inner ones, half of them with a reverse residual: 5 U with and 3 U without it. The others
    are last ones, with 3 U."""
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--dry-run"]) == 0
    expected = 24 * 64 * (20 + 3.8 * (5 + 3) / 2 + 1.2 * 3)
    assert f"{expected:,.0f} U per run" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
