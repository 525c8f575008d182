"""The figure of merit of `bench.gradient_variance`, and that each way learns from the transitions that it draws."""

import dataclasses

import pytest
import torch

from bench.gradient_variance import WAYS, Estimates, drawn, estimate, ratio
from fastnabla.config.presets import PRESETS
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.draws import DRAWS
from tests.checks import randn
from tests.runs import small


def estimates(gradients: torch.Tensor, passes: list[float]) -> Estimates:
    return Estimates(passes=passes, gradients={"LoRA": list(gradients)})


def test_merit_is_the_trace_of_the_covariance_times_the_passes() -> None:
    gradients, passes = randn(12, 7) + 3, [float(40 + i) for i in range(12)]
    found = estimates(gradients, passes)
    whole, without = found.merit("LoRA", found)
    assert whole == pytest.approx(gradients.T.cov().trace().item() * sum(passes) / 12)
    kept = torch.arange(12) != 4
    mean = sum(passes[i] for i in range(12) if i != 4) / 11
    assert without[4].item() == pytest.approx(gradients[kept].T.cov().trace().item() * mean, rel=1e-5)


def test_ratio() -> None:
    """Twice the deviation is four times the variance, in every batch; independent gradients have an interval that holds 1."""
    gradients, passes = randn(40, 9, seed=1), [10.0] * 40
    one, two, other = (estimates(rows, passes) for rows in (gradients, 2 * gradients, randn(40, 9, seed=2)))
    value, half = ratio(two.merit("LoRA", two), one.merit("LoRA", one))
    assert value == pytest.approx(4) and half == pytest.approx(0, abs=1e-4)
    value, half = ratio(other.merit("LoRA", other), one.merit("LoRA", one))
    assert 0.05 < half < 0.5 and abs(value - 1) < half


def test_a_fraction_adds_its_squared_distance() -> None:
    """The variance of g + e is the sum of theirs, if e has mean 0 given g."""
    gradients, error, passes = randn(800, 3, seed=1), 2 * randn(800, 3, seed=2), [1.0] * 800
    whole, noisy = estimates(gradients, passes), estimates(gradients + error, passes)
    rows = torch.stack(noisy.gradients["LoRA"])
    (found, _), direct = noisy.merit("LoRA", whole), rows.T.cov().trace().item()
    assert found == pytest.approx(direct, rel=0.1) and found == pytest.approx(15, rel=0.15)


@pytest.mark.slow
def test_every_way_learns_from_what_it_draws() -> None:
    preset = PRESETS["testbed"][1]
    rollout = dataclasses.replace(preset.rollout, trajectories=2, fraction=1.0)
    config = small(rollout=rollout, sampler=preset.sampler, objective=preset.objective)
    trainer = Trainer.from_config(config)
    found = estimate(trainer, config, 0)
    assert {way: passes for way, (passes, _) in found.items() if way[1] == 1} == {
        ("stratified", 1.0): pytest.approx(2 * 20 + found_passes("stratified")),
        ("uniform", 1.0): 2 * (20 + 4 * 5 + 3),
        ("runs", 1.0): 2 * (20 + 4 * 5 + 3),
    }
    assert all(gradient.any() for _, gradients in found.values() for gradient in gradients.values())
    trainer.source.rollout(3)
    for draw, fraction in WAYS:
        selection = drawn(trainer, config, draw, fraction, 3)
        assert torch.equal(selection.step_index.view(2, 5), DRAWS[draw](3, 0, 2, 20, 4))
        assert (selection.reverse_factor is None) == (fraction == 1)


def found_passes(draw: str) -> float:
    """U of the step: 5 of an inner transition, and 3 of a last one. A stratified draw may draw the last step twice."""
    last = (DRAWS[draw](0, 0, 2, 20, 4) == 19).sum().item()
    return 3 * last + 5 * (10 - last)
