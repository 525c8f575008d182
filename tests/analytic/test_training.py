"""The analytic testbed's command lines, from the configuration to the files of a run."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from fastnabla.analytic import compare, reach
from fastnabla.analytic.__main__ import main, parse
from fastnabla.analytic.compare import CompareConfig
from fastnabla.analytic.config import SETTINGS, settings
from fastnabla.analytic.experiment import Experiment
from fastnabla.analytic.reach import ReachConfig
from fastnabla.analytic.training import train, updates
from fastnabla.config.methods import METHODS
from fastnabla.config.training_sections import RolloutConfig

QUICK = ["--updates=4", "--steps=4", "--width=8", "--samples=64", "--rollout.trajectories=8", "--rollout.fraction=0.5"]
QUICK += ["--rollout.updates=4"]


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_command_line_writes_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(QUICK) == 0 and main([*QUICK, "--dimension=16"]) == 0
    for name in ("analytic-2d-residual-db-001", "analytic-16d-residual-db-001"):
        run = tmp_path / "runs" / name
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [r["update"] for r in records if r["phase"] == "evaluate"] == [0, 4]
        assert len([r for r in records if r["phase"] == "train"]) == 4
        assert json.loads((run / "config.json").read_text())["steps"] == 4
        assert "exact draws" in (run / "table.txt").read_text()
        for picture in ("samples.png", "curves.png"):
            with Image.open(run / picture) as image:
                assert image.width > 500
    assert "exact draws" in capsys.readouterr().out


def test_methods_have_settings_of_their_own():
    assert set(SETTINGS) == set(METHODS) - {"rsm", "vgg-flow"}
    residual, draft = parse([]), parse(["--method", "draft", "--updates", "8", "--optimizer.beta1", "0.5"])
    assert (residual.method, residual.optimizer.learning_rate) == ("residual-db", 1e-2)
    assert (draft.direct.k, draft.optimizer.learning_rate) == (10, 1e-3)
    assert (draft.updates, draft.optimizer.beta1) == (8, 0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_comparison_writes_a_line_for_each_method(tmp_path, capsys):
    folder = tmp_path / "run"
    assert compare.main([f"--folder={folder}", "--updates=4", "--samples=64", "--methods", "draft", "ddpo"]) == 0
    lines = (folder / "table.md").read_text().splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == ["| pretrained", "| draft", "| ddpo", "| exact draws"]
    for method in ("draft", "ddpo"):
        records = [json.loads(line) for line in (folder / method / "metrics.jsonl").read_text().splitlines()]
        passes = sum(record["passes"] for record in records if record["phase"] == "train")
        assert f" | {passes / 1000:.0f} | " in next(line for line in lines if line.startswith(f"| {method} "))
    with Image.open(folder / "samples.png") as image:
        assert image.width > 500
    assert compare.main([f"--folder={folder}"]) == 2
    assert "exists already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_passes_are_those_that_the_methods_plan():
    """An update has 32 trajectories of T = 50 steps. draft samples them, with a graph for K = 10 steps. ddpo makes a rollout
    for four updates before the first one, and then trains on 26 transitions of each trajectory."""
    rollout = RolloutConfig(trajectories=128, fraction=0.5, updates=4)
    for method, expected in {"draft": [32 * 60] * 2, "ddpo": [4 * 32 * 50 + 32 * 26 * 2, 32 * 26 * 2]}.items():
        records = itertools.islice(updates(Experiment(settings(method, rollout=rollout))), 2)
        assert [record["passes"] for record in records] == expected


def test_rollouts_are_learned_from_late_and_again_as_in_the_trainer():
    """Two rollouts, each trained on in two inner epochs and one rollout late: both are sampled before the first update. A
    rollout has 24 transitions. Inner ones cost 7 U, and 5 U in the second epoch; last ones cost 3 U, and 2 U."""
    rollout = RolloutConfig(trajectories=8, fraction=0.5, updates=1, epochs=2, replay=1)
    objective = dataclasses.replace(settings("residual-db").objective, reverse_target="policy")
    subject = Experiment(settings("residual-db", updates=4, steps=4, width=8, rollout=rollout, objective=objective))
    passes = [record["passes"] for record in updates(subject)]
    passes[0] -= 2 * 8 * 4
    for first, again in (passes[:2], passes[2:]):
        inner = (first - 3 * 24) / 4
        assert 8 <= inner <= 16 and again == 5 * inner + 2 * (24 - inner)


@pytest.mark.slow
def test_equal_seeds_give_equal_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert main([*QUICK, "--run", run, f"--seed={seed}"]) == 0
    a, b, c = (Path(run, "metrics.jsonl").read_text() for run in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--updates", "0"], "updates"),
        (["--updates", "6", "--rollout.updates", "4"], "updates"),
        (["--steps", "11"], "rollout.fraction"),
        (["--rollout.fraction", "0.001"], "rollout.fraction"),
        (["--flow-learning-rate", "-1"], "flow_learning_rate"),
        (["--objective.beta", "-1"], "objective.beta"),
        (["--run", "."], "run"),
        (["--reward-factor", "nan"], "reward_factor"),
        (["--method", "draft", "--direct.k", "60"], "direct.k"),
        (["--method", "draft", "--rollout.replay", "1"], "rollout.replay"),
        (["--optimizer.ema", "0.9"], "optimizer.ema"),
        (["--method", "dag", "--flow-learning-rate", "0"], "flow.kind"),
        (["--method", "db", "--objective.beta", "0"], "objective.beta"),
        (["--method", "db", "--min-sigma", "0.1"], "min_sigma"),
        (["--min-sigma", "0"], "min_sigma"),
        (["--min-sigma", "2"], "min_sigma"),
        (["--spacing", "trailing", "--steps", "30"], "timestep_spacing"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, field, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(arguments) == 2
    except SystemExit as stop:  # tyro's own, of what a section of the configuration refuses
        assert stop.code == 2
    assert field in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


def test_divergence_is_an_error_that_names_the_remedy(tmp_path):
    """Also where the loss is finite and the samples are not."""
    rollout = RolloutConfig(trajectories=8, fraction=0.5, updates=1, batch=8)
    config = settings("residual-db", steps=4, samples=16, updates=2, evaluate_every=1, rollout=rollout)
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match=r"not finite (after|in) update \d; lower optimizer.learning_rate"):
        train(Experiment(config), tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (ReachConfig, {"seeds": 0}, "seeds = 0: must be at least 1"),
        (ReachConfig, {"variants": ()}, r"variants = \(\): name at least one of published"),
        (ReachConfig, {"steps": ()}, r"steps = \(\): give at least one"),
        (CompareConfig, {"methods": ()}, r"methods = \(\): name at least one of residual-db"),
    ],
)
def test_nothing_to_do_is_refused(config, changes, said):
    with pytest.raises(ValueError, match=said):
        config(**changes)


@pytest.mark.parametrize("module", [compare, reach])
def test_other_dimensions_are_refused(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--dimension=3"])
    assert "dimension" in capsys.readouterr().err
