"""What each method needs, and that there is a step for each."""

import dataclasses
from typing import get_args

import pytest

from fastnabla.config.fields import dotted
from fastnabla.config.method_sections import Direct
from fastnabla.config.methods import METHODS, MethodName
from fastnabla.config.model_sections import FlowConfig, SamplerConfig
from fastnabla.config.train import TrainConfig
from fastnabla.methods.registry import STEPS
from fastnabla.objective.settings import Objective


def test_every_method_has_a_name_needs_and_a_step() -> None:
    assert get_args(MethodName) == tuple(METHODS) == tuple(STEPS)


@pytest.mark.parametrize("method", METHODS)
def test_fields_of_a_method_exist(method: str) -> None:
    fields = dotted(TrainConfig())
    assert {*METHODS[method].without, *METHODS[method].only} <= fields.keys()


REFUSED = [
    ("db", "sampler.eta", 0.5, "method = 'db' .* η = 1"),
    ("db", "objective.prior_weight", 0.5, "leave it at 1"),
    ("adjoint", "sampler.eta", 0.5, "method = 'adjoint' .* η = 1"),
    ("adjoint", "reward.normalise", True, "method = 'adjoint' has no rollout"),
    ("adjoint", "rollout.epochs", 2, "leave it at 1"),
    ("refl", "reward.normalise", True, "method = 'refl' has no rollout"),
    ("refl", "rollout.replay", 1, "leave it at 0"),
    ("draft", "rollout.epochs", 2, "leave it at 1"),
    ("draft", "direct.k", 51, "must be at most sampler.steps = 50"),
    ("draft-lv", "rollout.epochs", 2, "leave it at 1"),
    ("ddpo", "memory.output_block", 64, "leave it None"),
    ("dag", "sampler.eta", 0.5, "method = 'dag'"),
    ("dag", "flow.kind", "none", "learns a flow"),
    ("dag-kl", "sampler.eta", 0.5, "method = 'dag-kl'"),
    ("dag-kl", "flow.kind", "none", "learns a flow"),
    ("dag-kl", "memory.output_block", 64, "leave it None"),
    ("vgg-flow", "objective.reward_gradient", "terminal", "use lookahead_detached"),
]


@pytest.mark.parametrize(("method", "name", "value", "message"), REFUSED)
def test_values_that_a_method_does_not_allow(method: str, name: str, value: object, message: str) -> None:
    section, _, field = name.partition(".")
    changed = dataclasses.replace(getattr(TrainConfig(), section), **{field: value})
    TrainConfig(**{section: changed})
    with pytest.raises(ValueError, match=rf"{section}\.{field} = {value!r}: .*{message}"):
        TrainConfig(method=method, **{section: changed})


@pytest.mark.parametrize(
    ("method", "prior_weight", "expected"),
    [
        ("residual-db", 1.0, 3.0),
        ("residual-db", 0.5, None),
        ("residual-db", 0.0, None),
        ("draft", 0.5, 3.0),
        ("dag", 0.0, 3.0),
    ],
)
def test_the_target_of_a_method_is_tilted_by_beta_over_lambda(
    method: MethodName, prior_weight: float, expected: float | None
) -> None:
    objective = Objective(beta=3.0, prior_weight=prior_weight)
    assert TrainConfig(method=method, objective=objective).target_beta == expected


@pytest.mark.parametrize(("prior_weight", "expected"), [(1.0, 3.0), (0.5, 6.0), (0.0, None)])
def test_lambda_has_a_known_target_if_the_forward_residual_trains_no_flow(
    prior_weight: float, expected: float | None
) -> None:
    objective = Objective(beta=3.0, prior_weight=prior_weight)
    follows = dataclasses.replace(objective, reverse_target="reference")
    assert TrainConfig(objective=follows).target_beta == expected
    assert TrainConfig(objective=objective, flow=FlowConfig(kind="none")).target_beta == expected


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_without_densities_learn_from_an_ode(method: MethodName) -> None:
    sampler = SamplerConfig(scheduler="euler")
    if method in ("vgg-flow", "rsm"):
        TrainConfig(method=method, sampler=sampler)
        return
    with pytest.raises(ValueError, match=rf"sampler\.scheduler = 'euler': method = '{method}' needs steps with noise"):
        TrainConfig(method=method, sampler=sampler)


@pytest.mark.parametrize(("name", "value"), [("eta", 0.5), ("min_sigma", 0.1)])
def test_an_ode_has_no_noise_to_scale(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.{name} = {value}: .*euler has no noise; leave it"):
        SamplerConfig(scheduler="euler", **{name: value})


def test_planned_costs_of_direct_methods() -> None:
    """Late steps are 38 to 49 of 50."""
    for method, direct, passes, graphs in (
        ("refl", Direct(), 45.5, 1),
        ("refl", Direct(guidance_scale=1.0), 45.5 / 2, 1),
        ("refl", Direct(guidance_scale=3.0), 45.5, 1),
        ("draft", Direct(k=20), 70, 20),
        ("draft", Direct(k=20, kl=1.0), 90, 20),
        ("draft", Direct(k=20, truncation="random"), 60.5, 20),
        ("draft", Direct(k=20, truncation="random", kl=1.0), 71, 20),
        ("draft-lv", Direct(redraws=2), 55, 3),
    ):
        config = TrainConfig(method=method, direct=direct)
        cost = STEPS[method].cost(config)
        assert (cost.passes["trajectory"], STEPS[method].graphs(config)) == (passes, graphs)
        assert cost.decodes["trajectory"] == (3 if method == "draft-lv" else 1)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method = 'nonsense': must be one of residual-db, db"):
        TrainConfig(method="nonsense")
