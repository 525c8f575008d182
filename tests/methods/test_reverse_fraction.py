"""`objective.reverse_fraction`: the reverse residual of a drawn part of the transitions, with unbiased gradients."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fastnabla.config.model_sections import FlowConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import RolloutConfig
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.passes import planned_decodes, planned_passes
from fastnabla.methods.registry import objective_of
from fastnabla.objective.settings import Objective
from fastnabla.trajectories.reference_cache import ReferenceCache
from fastnabla.trajectories.sources import reverse_factors
from fastnabla.trajectories.transitions import LazyTransitions
from tests.checks import BACKENDS, assert_gradients
from tests.golden import GoldenStep
from tests.methods.test_sharing import batch as adjacent
from tests.small_step import shared_step

HALF = torch.tensor([2.0, 0.0] * 50)


def gradients(golden: GoldenStep, step: BalanceStep, selection: LazyTransitions) -> dict[str, Tensor]:
    for parameter in step.parameters:
        parameter.grad = None
    step(selection)
    return {name: gradient.clone() for name, gradient in golden.gradients().items()}


def with_factors(selection: LazyTransitions, factors: Tensor) -> LazyTransitions:
    return dataclasses.replace(selection, reverse_factor=factors[: len(selection)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reused", "backend", "objective"),
    [
        (False, "torch", {}),
        (True, "torch", {}),
        (False, "torch", {"reward_gradient": "lookahead_detached"}),
        (True, "torch", {"reward_gradient": "terminal"}),
        (False, "torch", {"reverse_second_order": True}),
        pytest.param(False, "triton", {}, marks=BACKENDS[1].marks),
    ],
)
def test_draws_and_the_rest_average_to_the_whole_gradient(reused, backend, objective):
    """Half of the transitions with factor 2 and the other half with factor 2: the mean of both is the gradient of all, to
    float32 rounding."""
    golden = shared_step()
    selection = (adjacent(golden) if reused else golden.transitions).select()
    step = golden.step(3, backend, reuse_passes=reused, **objective)
    whole = gradients(golden, step, selection)
    halves = [gradients(golden, step, with_factors(selection, factors)) for factors in (HALF, 2 - HALF)]
    assert_gradients({name: (halves[0][name] + halves[1][name]) / 2 for name in whole}, whole)
    if not objective.get("reverse_second_order"):  # the reverse residual does not train the LoRA
        assert_gradients(*({name: of[name] for name in whole if ".lora." in name} for of in (halves[0], whole)))
    assert not torch.allclose(*(torch.cat([g.flatten() for n, g in of.items() if ".flow." in n]) for of in halves))


@pytest.mark.parametrize("reward_gradient", ["lookahead", "lookahead_detached", "terminal"])
def test_passes(reward_gradient):
    """Half of the inner transitions take the passes of "reverse", the others those of "forward"."""
    golden = shared_step()
    selection = golden.transitions.select()
    inner = selection.step_index < len(golden.table) - 1
    factors = torch.zeros(len(selection))
    factors[torch.where(inner)[0][::2]] = 2
    step = golden.step(100, reward_gradient=reward_gradient, reverse_fraction=0.5)
    report = step(with_factors(selection, factors))
    share = (factors > 0).sum().item() / inner.sum().item()
    planned = planned_passes(dataclasses.replace(step.objective, reverse_fraction=share), True)
    assert report.passes == pytest.approx(dict(zip(("inner", "last"), planned, strict=True)))
    assert planned_decodes(step.objective, True) == ((0, 1) if reward_gradient == "terminal" else (1.5, 1))


@pytest.mark.slow
def test_later_epochs_read_the_products_that_the_first_has_cached():
    golden = shared_step()
    step, selection = golden.step(2), with_factors(golden.transitions.select(), HALF)
    count = len(selection)
    cache = ReferenceCache(count, 1, tuple(golden.transitions.x.shape[1:]), True, torch.device("cpu"))
    kept = dataclasses.replace(selection, reference=cache.of(torch.arange(count)))
    expected, _ = gradients(golden, step, selection), gradients(golden, step, kept)
    assert_gradients(gradients(golden, step, kept), expected)


@pytest.mark.parametrize("draw", ["stratified", "runs"])
def test_factors_of_a_rollout(draw):
    """Their mean is 1, the last transition always counts, and rollouts draw anew: a quarter of the runs is drawn in one of four
    ways."""
    rollout = RolloutConfig(trajectories=64, draw=draw)
    factors = reverse_factors(5, rollout, 4, 0.25)
    first = factors(0)
    assert first.shape == (64, 5) and (first[:, 0] == 1).all()
    assert first.unique().tolist() == [0, 1, 4]
    assert first[:, 1:].mean() == 1
    assert (first[:, 1:].amax(1) > 0).sum() == (16 if draw == "runs" else 64)
    assert torch.equal(factors(0), first)
    assert len({tuple(factors(rollout_index).flatten().tolist()) for rollout_index in range(20)}) == (
        4 if draw == "runs" else 20
    )
    assert reverse_factors(5, rollout, 4, 1.0) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.5),
        ({"method": "db"}, 0.5),
        ({"method": "rsm"}, 1.0),
        ({"flow": FlowConfig(kind="none")}, 1.0),
        ({"objective": Objective(reverse_fraction=0.5, reverse_weight=0.0)}, 1.0),
        ({"objective": Objective(reverse_fraction=0.5, reverse_target="reference")}, 1.0),
    ],
    ids=str,
)
def test_it_acts_only_where_there_is_a_choice(changes, expected):
    config = TrainConfig(**({"objective": Objective(reverse_fraction=0.5)} | changes))
    assert config.reverse_fraction == objective_of(config).reverse_fraction == expected


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match=r"objective\.reverse_fraction = .*must be in \(0, 1\]"):
        Objective(reverse_fraction=fraction)
