"""What wires a run: settings are checked first, planned once, and every part is the run's own."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastnabla import train
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, RolloutConfig
from fastnabla.distributed.launch import RankInfo
from fastnabla.models.build import resolve_compute
from fastnabla.objective.settings import Objective
from fastnabla.training import build, command
from fastnabla.training.build import build_components, plan_and_build
from tests.faults import tiny
from tests.integration.test_cli import QUICK
from tests.runs import on_testbed


@pytest.mark.slow
def test_a_command_line_plans_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, planned = [], command.planned

    def counted(*arguments):
        calls.append(arguments)
        return planned(*arguments)

    for module in (command, build):
        monkeypatch.setattr(module, "planned", counted)
    assert train.main([*QUICK, "--dry-run"]) == 0
    assert len(calls) == 1 and calls[0][-1] == 10, "for the prompts of the testbed"


@pytest.mark.parametrize(
    ("device", "sharded", "second_order", "compile"),
    [
        ("cpu", False, False, "none"),
        ("cuda", False, False, "whole"),
        ("cuda", True, False, "blocks"),
        ("cuda", False, True, "none"),
        ("cuda", True, True, "none"),
    ],
)
def test_what_is_compiled_by_default(device: str, sharded: bool, second_order: bool, compile: str) -> None:
    """Networks that are compiled have no second derivatives."""
    config = TrainConfig(objective=Objective(reverse_second_order=second_order))
    assert resolve_compute(config, torch.device(device), sharded) == (compile, device == "cuda")


@pytest.mark.slow
def test_what_is_open_is_planned() -> None:
    config = dataclasses.replace(tiny(), memory=dataclasses.replace(tiny().memory, micro_batch=None))
    components = plan_and_build(config)
    assert components.step.micro_batch == components.config.memory.micro_batch is not None


def test_parts_are_shared() -> None:
    """A checkpoint saves, and an update that is not finite is written from, what the loop trains."""
    components = build_components(tiny())
    state, anomalies = components.state, components.anomalies
    for name in ("policy", "flow", "reward", "step"):
        assert getattr(state, name) is getattr(anomalies, name) is getattr(components, name)
    for name in ("optimizer", "buffer", "ema"):
        assert getattr(state, name) is getattr(components, name)


def test_the_text_encoders_are_off_the_device_before_the_network_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 XXL is larger than Stable Diffusion 3.5 medium's transformer."""
    moves, move = [], nn.Module.to

    def recorded(module: nn.Module, *arguments: object, **settings: object) -> nn.Module:
        moves.append((type(module).__name__, *arguments))
        return move(module, *arguments, **settings)

    monkeypatch.setattr(nn.Module, "to", recorded)
    build_components(tiny())
    names = [name for name, *_ in moves]
    away = moves.index(("CLIPTextModel", "cpu"))
    assert names.index("CLIPTextModel") < away < names.index("Policy")
    assert "UNet2DConditionModel" not in names[:away]


def test_settings_that_processes_do_not_have_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "pipeline_of", lambda *_: pytest.fail("a model is loaded"))
    world = SimpleNamespace(rank=0, size=2, rank_info=RankInfo(size=2))
    rollout = RolloutConfig(trajectories=2, fraction=0.5, updates=2)
    with pytest.raises(ValueError, match=r"rollout\.trajectories = 2"):
        build_components(dataclasses.replace(tiny(), rollout=rollout), world=world)


def test_a_bound_needs_a_probe_that_measures_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_probe", lambda *_: object())
    monkeypatch.setattr(build, "pipeline_of", lambda *_: pytest.fail("a model is loaded"))
    evaluation = EvaluationConfig(probe="testbed", stop_above_prior=2.0)
    with pytest.raises(ValueError, match="stop_above_prior"):
        build_components(dataclasses.replace(tiny(), evaluation=evaluation))


def test_the_testbeds_classifiers_need_its_own_size() -> None:
    config, sides = on_testbed(tiny()), {"height": 32, "width": 64}
    with pytest.raises(ValueError, match=r"evaluation\.probe = 'testbed', reward\.terms = classifier: .* 32 × 64"):
        build_components(dataclasses.replace(config, model=dataclasses.replace(config.model, **sides)))
