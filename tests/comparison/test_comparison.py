"""The parts of a comparison: budget, settings, plan, points, summaries, plots and tables."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastnabla.comparison import figures, page
from fastnabla.comparison.plan import Plan, make_plan
from fastnabla.comparison.points import Point, seconds_by_update
from fastnabla.comparison.settings import METHOD_SETTINGS, method_config, method_settings
from fastnabla.comparison.sheet import Sheet
from fastnabla.comparison.summary import Mean, Spread, changes, common_rewards, front, matched
from fastnabla.comparison.tables import final_sheet, matched_sheet
from fastnabla.config.methods import METHODS, MethodName
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import to_json
from fastnabla.cost.budget import measured_passes, measured_rows, update_passes, updates_within
from fastnabla.metrics.diversity import hue_entropy_ceiling
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.draws import DRAWS
from tests.integration.test_methods import config_of

ON_DIFFUSION = [method for method in METHODS if method != "vgg-flow"]
"""Methods for the testbed, which is a diffusion model."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_DIFFUSION)
def test_measured_passes_are_those_the_networks_make(method: str) -> None:
    """For two updates and their rollout, by the policy's counter."""
    trainer = Trainer.from_config(config_of(method, updates=2))
    config, counter, measured = trainer.config, trainer.policy.passes, 0.0
    before = counter.rows
    trainer.source.collect(0)
    for half in ((0, 1), (2, 3)):
        report = trainer.step(trainer.source.select(0, torch.tensor(half)))
        record = {f"rows_{kind}": count for kind, count in report.counts.items()}
        assert measured_rows(config, record) == (6 if METHODS[method].stores else 2)
        measured += measured_passes(config, record | {f"passes_{kind}": each for kind, each in report.passes.items()})
    assert counter.rows - before == pytest.approx(measured, rel=1e-12)
    if method in ("adjoint", "draft", "draft-lv", "ddpo"):  # of the others it depends on the draws
        assert measured == 2 * update_passes(config)


@pytest.mark.parametrize("draw", ["stratified", "uniform"])
def test_planned_passes_are_the_mean_over_draws(draw: str) -> None:
    """A stratified draw may be the last step, which costs 3 U instead of 7. 4,000 trajectories, five standard errors."""
    config = config_of("residual-db")
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, draw=draw))
    steps, drawn, count = config.sampler.steps, config.drawn_steps, 4000
    last = (DRAWS[draw](0, 0, count, steps, drawn) == steps - 1).sum(1).double()
    each = steps + 3 * last + 7 * (drawn + 1 - last)
    tolerance = 5 * each.std().item() / count**0.5
    assert update_passes(config) / 2 == pytest.approx(each.mean().item(), abs=tolerance, rel=1e-12)


def test_updates_fill_the_budget_and_never_pass_it() -> None:
    config = config_of("draft")  # 2 trajectories an update, 2 updates a rollout, 4 + 2 U each
    assert update_passes(config) == 12
    assert [updates_within(config, passes) for passes in (1, 23.9, 24, 47, 48, 100)] == [2, 2, 2, 2, 4, 8]
    for method in ON_DIFFUSION:
        config = dataclasses.replace(PRESETS["testbed"][1], method=method)
        count = updates_within(config, 60_000)
        assert count * update_passes(config) <= 60_000 < (count + 1) * update_passes(config)


def plan(**changes) -> Plan:
    options = {"preset": "testbed", "methods": ("residual-db", "draft"), "seeds": 1, "folder": Path("nowhere")}
    return make_plan(**{**options, **changes})


def test_budget_by_default_is_the_first_method_s() -> None:
    found = plan()
    # The preset's updates: rollout, inner and last transitions. One draw in five from the last stratum is a last one. Half of the
    # inner ones have a reverse residual.
    assert found.passes == pytest.approx(24 * 64 * (20 + 3.8 * (5 + 3) / 2 + 1.2 * 3))
    assert [run.config.updates for run in found.runs] == [24, found.passes // (64 * 21)]
    assert [run.config.evaluation.every for run in found.runs] == [4, 8]
    equal = plan(updates=5)
    assert equal.passes is None and [run.config.updates for run in equal.runs] == [5, 5]


def test_settings_go_from_the_preset_to_the_method_to_the_command_line() -> None:
    rate = METHOD_SETTINGS["testbed"]["draft"]["optimizer.learning_rate"]
    given = ["optimizer.beta2=0.9", "draft.direct.k=3", "refl.direct.late=0.5", "reward.terms=area=8 hue=1"]
    settings = method_settings("testbed", "draft", given)
    assert settings == {
        "optimizer.learning_rate": rate, "optimizer.beta2": "0.9", "direct.k": "3", "reward.terms": "area=8 hue=1",
    }  # fmt: skip
    config = method_config("testbed", "draft", settings)
    assert (config.method, config.optimizer.learning_rate, config.optimizer.beta2) == ("draft", float(rate), 0.9)
    assert (config.direct.k, config.reward.terms, config.direct.late) == (3, ("area=8", "hue=1"), 0.25)
    both = ["draft.optimizer.learning-rate=2", "optimizer.learning_rate=1"]
    assert method_settings("testbed", "draft", both)["optimizer.learning_rate"] == "2"
    assert method_settings("testbed", "db", both)["optimizer.learning_rate"] == "1"
    assert method_settings("sd15-aesthetic", "draft", []) == {}


@pytest.mark.slow
def test_a_variant_has_its_method_s_settings_and_its_own() -> None:
    found = plan(
        methods=("draft", "draft,direct.k=3", "draft,direct.k=4,optimizer.learning-rate=1e-4"),
        settings=["draft.direct.k=2", "optimizer.beta2=0.9"],
    )
    values = [(r.config.direct.k, r.config.optimizer.learning_rate, r.config.optimizer.beta2) for r in found.runs]
    assert values == [(2, 3e-3, 0.9), (3, 3e-3, 0.9), (4, 1e-4, 0.9)]
    assert [run.folder.name for run in found.runs] == [
        "draft-seed-0", "draft,direct.k=3-seed-0", "draft,direct.k=4,optimizer.learning-rate=1e-4-seed-0",
    ]  # fmt: skip
    assert [found.of(variant) for variant in found.variants] == [[run] for run in found.runs]
    other = plan(methods=("draft", "refl,direct.late=0.5,optimizer.beta2=0.8"), settings=["refl.optimizer.beta1=0.5"])
    assert other.own_settings("refl,direct.late=0.5,optimizer.beta2=0.8") == ["optimizer.beta1 = 0.5"]


@pytest.mark.parametrize("method", ON_DIFFUSION)
def test_the_methods_own_settings_are_valid(method: MethodName) -> None:
    for preset, own in METHOD_SETTINGS.items():
        config = method_config(preset, method, own.get(method, {}))
        assert config.method == method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "nothing"}, "preset = 'nothing': must be one of testbed"),
        ({"methods": ()}, "methods = ''"),
        ({"methods": ("draft", "draft")}, "methods = 'draft draft'"),
        ({"methods": ("drift",)}, "methods = 'drift': 'drift' must be one of residual-db"),
        ({"methods": ("draft,direct.k",)}, r"methods = 'draft,direct\.k': write METHOD,FIELD=VALUE"),
        ({"methods": ("draft,direct.k=",)}, r"write METHOD,FIELD=VALUE"),
        ({"methods": ("draft,reward.clip=1",)}, r"reward\.clip must be the same for all methods"),
        ({"methods": ("draft,objective.gamma=constant",)}, r"draft does not use objective\.gamma"),
        ({"settings": ["ddpo.direct.k=3"]}, r"ddpo does not use direct\.k"),
        ({"methods": ("draft,seed=1",)}, "seed is set by the comparison"),
        ({"methods": ("draft,direct.k=../1",)}, "is part of the names of run folders"),
        ({"methods": ("draft,direct.k=21",)}, r"direct\.k = 21"),
        ({"seeds": 0}, "seeds = 0"),
        ({"points": 0}, "points = 0"),
        ({"passes": float("inf")}, "passes = inf"),
        ({"passes": 10.0, "updates": 3}, "updates = 3: give either"),
        ({"settings": ["direct.k"]}, r"set = 'direct\.k': write FIELD=VALUE"),
        ({"settings": ["seed=3"]}, "seed is set by the comparison"),
        ({"settings": ["draft.evaluation.every=3"]}, r"evaluation\.every is set by the comparison"),
        (
            {"settings": ["draft.reward.terms=hue=1"]},
            "reward.terms must be the same for all methods; write --set reward.terms=",
        ),
        ({"settings": ["draft.direct.k=21"]}, r"direct\.k = 21"),
        ({"settings": ["draft.rollout.updates=3"]}, r"rollout\.updates"),
    ],
)
def test_bad_plans_are_refused(changes: dict, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with pytest.raises(ValueError, match=message):
            plan(**changes)
    except SystemExit:  # what tyro finds is printed
        assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "draft-seed-0").mkdir()
    plan(folder=tmp_path).check_folders()  # an empty folder, left by a job that ended before its run started
    (tmp_path / "draft-seed-0" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="draft-seed-0': exists and is not a run folder"):
        plan(folder=tmp_path).check_folders()


@pytest.mark.parametrize("updates", [4, 6])
def test_another_number_of_updates_is_refused(updates: int, tmp_path: Path) -> None:
    """Even with a constant schedule, with which a run's updates do not depend on their number."""
    constant = ["optimizer.schedule=constant"]
    (run,) = plan(folder=tmp_path, methods=("draft",), updates=5, settings=constant).runs
    run.folder.mkdir()
    (run.folder / "config.json").write_text(to_json(run.config))
    run.check_folder()
    message = rf"updates = {updates}: the run in '.*draft-seed-0' has started with 5.* Give a budget of 5 updates, or another --run"
    with pytest.raises(ValueError, match=message):
        plan(folder=tmp_path, methods=("draft",), updates=updates, settings=constant).check_folders()


def test_seconds_leave_out_evaluations_checkpoints_and_starts() -> None:
    records = [
        ("start", 0, 9.0), ("evaluate", 0, 10.0), ("train", 1, 12.0), ("train", 2, 15.0), ("evaluate", 2, 25.0),
        ("checkpoint", 2, 26.0), ("start", 2, 7.0), ("train", 3, 11.0),
    ]  # fmt: skip
    lines = [{"phase": phase, "update": update, "seconds": seconds} for phase, update, seconds in records]
    assert seconds_by_update(lines) == {1: 2.0, 2: 3.0, 3: 4.0}


@pytest.mark.parametrize(
    ("records", "seconds"),
    [
        # It is recorded after the update that it delayed.
        ([("train", 1, 10.0), ("train", 2, 15.0), ("checkpoint", 1, 15.1)], 2.0),
        # The one before is recorded before it is saved,
        ([("train", 1, 10.0), ("checkpoint", 0, 10.5), ("train", 2, 15.5), ("checkpoint", 1, 15.6)], 2.0),
        # or after that, when it has been waited for,
        ([("train", 1, 10.0), ("checkpoint", 0, 13.5), ("train", 2, 15.5), ("checkpoint", 1, 15.6)], 2.0),
        # or it is itself recorded at once.
        ([("train", 1, 10.0), ("checkpoint", 1, 13.5), ("train", 2, 15.5)], 2.0),
        # The update that it delayed is repeated by a later process, which has removed the first record of it.
        ([("train", 1, 10.0), ("checkpoint", 1, 15.1), ("start", 1, 5.0), ("train", 2, 7.0)], 2.0),
    ],
)
def test_seconds_leave_out_the_stalls_of_checkpoints(records: list[tuple[str, int, float]], seconds: float) -> None:
    """Saving after the first update takes three seconds, and the second update two."""
    lines = [{"phase": phase, "update": update, "seconds": at} for phase, update, at in records]
    for line in lines:
        if line["phase"] == "checkpoint":
            line["checkpoint_stall_seconds"] = 3.0
    assert seconds_by_update(lines)[2] == pytest.approx(seconds)


def test_front() -> None:
    """By definition, a point is on the front if no other is above it and to its right."""
    assert front([(0, 3), (1, 2), (1, 1), (2, 2), (3, 0), (0, 3)]) == [0, 3, 4, 5]
    assert front([(1.0, 1.0)]) == [0]


def point(variant: str, seed: int, update: int, **metrics: float) -> Point:
    spent = {"passes": 10.0 * update, "trajectories": update, "transitions": update, "seconds": 0.5 * update}
    return Point(variant=variant, seed=seed, update=update, untimed=0, **spent, metrics=metrics)


POINTS = [
    *[point("a", 0, update, reward=reward) for update, reward in ((0, 9.0), (1, 2.0), (2, 5.0))],
    *[point("b", 0, update, reward=reward) for update, reward in ((0, 9.0), (3, 3.0), (6, 2.8))],
    *[point("a", 1, update, reward=reward) for update, reward in ((0, 0.0), (1, 0.5), (2, 1.0))],
    *[point("b", 1, update, reward=reward) for update, reward in ((0, 0.0), (3, 4.0), (6, 8.0))],
]


def test_matched_points_are_of_one_seed_and_never_the_pretrained_model() -> None:
    assert common_rewards(POINTS) == {0: 3.0, 1: 1.0}
    assert [(p.variant, p.seed, p.update) for p in matched(POINTS)] == [
        ("a", 0, 1),
        ("b", 0, 3),
        ("a", 1, 2),
        ("b", 1, 3),
    ]


def test_changes_are_from_the_run_s_own_start_and_means_are_over_seeds() -> None:
    moved = [p for p in changes(POINTS) if (p.variant, p.update) == ("b", 6)]
    mean = Mean.of(moved)
    assert mean.metrics["reward"] == Spread(pytest.approx((-6.2 + 8) / 2), pytest.approx(-6.2), 8.0)
    assert (mean.passes, mean.seconds) == (Spread(60.0, 60.0, 60.0), Spread(3.0, 3.0, 3.0))
    assert all(p.metrics["reward"] == 0 for p in changes(POINTS) if p.update == 0)


def test_every_method_has_a_colour_of_its_own() -> None:
    """Whatever else is in the plot."""
    assert len(set(figures._colours(METHODS).values())) == len(METHODS)
    assert all(figures._colours([method]) == {method: figures.METHOD_COLOURS[method]} for method in METHODS)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_pictures_tell_all_variants_apart() -> None:
    variants = ["residual-db", "draft", *(f"draft,direct.k={k}" for k in range(10))]
    colours = figures._colours(variants)
    assert list(colours) == variants and len(set(colours.values())) == 12
    assert colours["draft"] == figures.METHOD_COLOURS["draft"]
    points = [point(variant, 0, update, reward=update) for variant in variants for update in (0, 6)]
    tall, flat = (Image.open(io.BytesIO(figures.reward_curves(some))).size for some in (points, points[:4]))
    assert tall[0] == flat[0] and tall[1] > flat[1]  # by the lines of the legend


def test_hue_entropy_is_also_given_as_a_share_of_its_ceiling() -> None:
    ceiling = hue_entropy_ceiling(16)
    points = [
        point("a", seed, update, reward=1.0, hue_entropy=share * ceiling)
        for seed, shares in enumerate(((1.0, 0.8), (1.0, 0.9)))
        for update, share in enumerate(shares)
    ]
    for sheet in (final_sheet(points, 16), matched_sheet(points, 16)):
        (column,) = [i for i, name in enumerate(sheet.columns) if "ceiling for 16 samples a prompt, 0.836" in name]
        assert [row[column] for row in sheet.rows] == ["100.0", "85.0 [80.0, 90.0]"]
        assert sheet.rows[0][sheet.columns.index("hue_entropy")] == "0.8362"
    assert not any("ceiling" in name for name in final_sheet(points, 1).columns)


def test_texts_of_tables_are_escaped() -> None:
    sheet = Sheet("a <title>", ["a|b", "<c>"], [["1|2\\", "</td>"]])
    assert "| a\\|b | <c> |\n| --- | ---: |\n| 1\\|2\\\\ | </td> |\n" in sheet.markdown()
    shown = page.table(sheet)
    assert shown.count("<td>") == 2 and "&lt;/td&gt;" in shown and "<c>" not in shown and "a &lt;title&gt;" in shown
    assert page.picture(b"", '"><script>') == (
        '<figure><img alt="&quot;&gt;&lt;script&gt;" src="data:image/png;base64,">'
        "<figcaption>&quot;&gt;&lt;script&gt;</figcaption></figure>"
    )
