"""Every method through the trainer: it runs, again to the same bits, resumed too, at the planned cost."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastnabla.config.method_sections import Direct
from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import ModelConfig, RewardConfig
from fastnabla.config.train import TrainConfig, from_json, to_json
from fastnabla.config.training_sections import EvaluationConfig
from fastnabla.methods.direct import late_step, random_k
from fastnabla.methods.registry import STEPS
from fastnabla.run.curves import CURVES, curves
from fastnabla.run.tracker import read_records
from fastnabla.train import parse
from fastnabla.training.trainer import Trainer
from fastnabla.utils.seeding import seed_of
from tests.checks import NETWORK_DTYPE
from tests.faults import assert_same_result
from tests.run.test_curves import assert_readable
from tests.runs import copy_after_update_1, small, train, without_pictures

OTHERS = [name for name in METHODS if name not in ("residual-db", "vgg-flow")]
"""`tests/methods/test_velocity_matching.py` trains a flow model with VGG-Flow."""
RUNS = {name: {"method": name} for name in OTHERS} | {
    "dag-kl": {"method": "dag-kl", "objective": dataclasses.replace(small().objective, beta_schedule="linear")},
    "reference target": {
        "method": "residual-db",
        "objective": dataclasses.replace(small().objective, reverse_target="reference"),
    },
    "nf4": {"method": "residual-db", "model": dataclasses.replace(small().model, quantise="nf4")},
    "without guidance": {"method": "refl", "direct": Direct(late=0.5, guidance_scale=1.0)},
    "random truncation": {"method": "draft", "direct": Direct(k=3, truncation="random", kl=1.0)},
}
"""Test's name → settings. `tests/training/test_trainer.py` runs residual ∇-DB as it is by default."""


def config_of(method: str, **changes) -> TrainConfig:
    """One rollout of two updates. ReFL's steps are the last two."""
    evaluation = dataclasses.replace(small().evaluation, every=0)
    changes = {"updates": 2, "direct": Direct(k=2, late=0.5), "evaluation": evaluation} | changes
    return small(method=method, **changes)


def drawn_metrics() -> set[str]:
    return {name for _, names, _ in CURVES.values() for name in names}


def records_of(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "train"]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Settings → folder of a run with them, trained once. Beside it is its copy "stopped" of between its two updates."""
    folders: dict[str, Path] = {}

    def run(**settings) -> Path:
        config = config_of(**settings)
        key = to_json(config)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("runs") / "run"
            folders[key].mkdir()
            trainer = without_pictures(Trainer.from_config(config))
            copy_after_update_1(trainer, folders[key], folders[key].parent / "stopped")
            trainer.train(folders[key])
        return folders[key]

    return run


ALIKE = ("db", "rsm", "dag-kl", "draft-lv", "without guidance", "random truncation", "nf4")
"""Their steps are those of others but for a formula, or the format of the weights."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [pytest.param(run, id=name, marks=pytest.mark.slow if name in ALIKE else ()) for name, run in RUNS.items()],
)
def test_run(settings: dict, run_of: Callable[..., Path], tmp_path: Path) -> None:
    """Complete; and resumed from a copy of between two updates of a rollout, bit for bit the same."""
    config = config_of(**settings)
    run = run_of(**settings)
    records = records_of(run)
    assert [record["update"] for record in records] == [1, 2]
    assert {name for name in records[0] if re.match("loss_|norm_|grad_norm_", name)} <= drawn_metrics()
    assert_readable(curves(read_records(run / "metrics.jsonl", config.updates)))
    weights = load_file(run / "lora/pytorch_lora_weights.safetensors")
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name or "lora.up" in name)

    cost = STEPS[config.method].cost(config)
    for number, record in enumerate(records):
        passes = {kind: record[f"passes_{kind}"] for kind in cost.rows}
        planned = dict(cost.passes)
        if config.method == "refl":  # the plan is the average over the draws of its steps
            draws = [late_step(seed_of(0, "draws", 2 * number + i), 2, 4) for i in range(2)]
            planned["trajectory"] = (sum(draws) / 2 + 2) / (2 if config.direct.guidance_scale == 1 else 1)
        if config.direct.truncation == "random":
            planned["trajectory"] = 4 + 2 * random_k(seed_of(0, "update", number), 3)
        if config.method == "dag-kl":  # the plan is the average over the updates of a rollout
            planned = {"inner": 3 + number % 2, "last": 2 + number % 2}
        assert passes == planned

    stopped = shutil.copytree(run.parent / "stopped", tmp_path / "stopped")
    assert len(records_of(stopped)) == 1
    without_pictures(Trainer.from_config(config)).train(stopped, resume=True)
    assert_same_result(stopped, run)


@pytest.mark.slow
def test_methods_that_store_nothing_sample_what_a_rollout_does(tmp_path: Path) -> None:
    """Prompts and noise are those of the trajectories' numbers, whatever the method: before the first update, DRaFT's
    and Adjoint Matching's samples are the rollout's of residual ∇-DB."""
    rollout = dataclasses.replace(small().rollout, updates=1)
    configs = [config_of(method, updates=1, rollout=rollout) for method in ("residual-db", "draft", "adjoint")]
    first, *others = (records_of(train(config, tmp_path / config.method))[0] for config in configs)
    for name in ("rollout_reward", "rollout_reward_std"):
        for other in others:
            assert first[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.skipif(NETWORK_DTYPE != "bfloat16", reason="needs bfloat16 instructions")
@pytest.mark.parametrize("method", ["dag", "draft", "adjoint", "ddpo"])
def test_bfloat16_networks_train_a_float32_lora(method: str, tmp_path: Path) -> None:
    """A method of each kind of step, on latents of 4 × 4."""
    config = config_of(
        method,
        updates=2,
        model=ModelConfig(name="testbed", dtype="bfloat16", height=16, width=16),
        reward=RewardConfig(terms=("hue=1",)),
        evaluation=EvaluationConfig(every=2, samples=2, prompts=2),
    )
    trainer = without_pictures(Trainer.from_config(config))
    folder = tmp_path / "run"
    folder.mkdir()
    trainer.train(folder)
    assert all(parameter.isfinite().all() for parameter in trainer.step.parameters)
    assert any(parameter.any() for name, parameter in trainer.policy.trained().items() if "lora_B" in name)
    if method == "ddpo":  # the first update trains the policy that sampled; the outputs are stored in float32
        assert records_of(folder)[0]["ratio"] == pytest.approx(1, abs=1e-5)


OTHER_VALUES = {
    "objective": {
        "gamma": "sqrt_alpha_bar", "reward_gradient": "terminal", "weighting": "score", "prior_weight": 0.5, "reverse_weight": 3.0,
        "reverse_second_order": True, "reverse_fraction": 0.5, "beta_schedule": "linear", "reverse_target": "reference", "trust_region_weight": 30.0,
    },
    "direct": {"k": 3, "truncation": "random", "kl": 0.5, "redraws": 3, "late": 0.9, "guidance_scale": 1.0},
    "policy_gradient": {"clip": 0.3, "advantage_clip": 0.1, "window": 3, "min_count": 2},
    "flow": {"kind": "unet", "start": "random", "learning_rate": 0.1, "weight_decay": 0.3, "average": 0.5},
    "rollout": {"fraction": 0.25, "draw": "uniform"},
    "memory": {"buffer": "pinned", "output_block": 64},
}  # fmt: skip
"""Section → field → a value that is not that of `config_of`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        name
        for name in METHODS
        if name not in ("dag-kl", "vgg-flow")  # `dag` has nearly the same
    ],
)
def test_settings_without_a_part_in_a_method_change_nothing(
    method: str, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    config, others = config_of(method), {}
    for name in METHODS[method].without:
        section, _, field = name.partition(".")
        others.setdefault(section, {})[field] = OTHER_VALUES[section][field]
    for section, values in others.items():
        assert all(getattr(getattr(config, section), field) != value for field, value in values.items())
        others[section] = dataclasses.replace(getattr(config, section), **values)
    changed = dataclasses.replace(config, **others)
    assert_same_result(train(changed, tmp_path / "changed"), run_of(method=method))


@pytest.mark.slow
def test_settings_without_a_part_in_a_method_are_refused_on_its_command_line() -> None:
    for method, name, value in (
        ("residual-db", "direct.k", "2"), ("draft", "objective.gamma", "constant"), ("refl", "direct.k", "2"),
        ("ddpo", "flow.kind", "unet"), ("dag", "objective.reverse_weight", "2"), ("adjoint", "objective.reverse_weight", "2"), ("draft-lv", "rollout.fraction", "0.5"),
        ("db", "objective.reverse_target", "reference"), ("dag", "flow.average", "0.9"),
        ("residual-db", "objective.beta_schedule", "linear"), ("rsm", "objective.gamma", "constant"), ("dag-kl", "policy_gradient.window", "8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{re.escape(name)} = .* has no effect on method = '{method}'"):
            parse(["testbed", "--method", method, f"--{name}", value])
    assert parse(["testbed", "--method", "draft", "--objective.beta", "5", "--direct.k", "3"]).direct.k == 3


@pytest.mark.parametrize("settings", [
    {"k": 0}, {"redraws": 0}, {"late": 0.0}, {"late": 1.5}, {"kl": -1.0}, {"kl": float("inf")}, {"truncation": "none"},
    {"guidance_scale": 0.0},
])  # fmt: skip
def test_settings_of_direct_methods_are_checked(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"direct\.{name} = "):
        Direct(**settings)


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_through_json(method: str) -> None:
    config = config_of(method)
    assert from_json(to_json(config)) == config
