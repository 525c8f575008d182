"""What each method needs, and that there is a step for each."""

import dataclasses
from typing import get_args

import pytest

from fastnabla.config.fields import dotted
from fastnabla.config.methods import METHODS, MethodName
from fastnabla.config.model_sections import FlowConfig
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


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method = 'nonsense': must be one of residual-db, db"):
        TrainConfig(method="nonsense")
