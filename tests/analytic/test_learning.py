"""Every method on a known target: it learns what its objective says, and would not with a wrong one."""

import dataclasses

import pytest

from fastnabla.analytic.config import SETTINGS, AnalyticConfig, settings
from fastnabla.analytic.experiment import Experiment
from fastnabla.analytic.training import measure, updates
from fastnabla.config.training_sections import RolloutConfig

BALANCE = {"residual-db": 120, "db": 80, "dag": 80, "dag-kl": 120, "adjoint": 80}
"""Updates, by method with a target."""
WEAKENED = ("residual-db", "db")
"""Methods that are also trained with 0.4 of the reward, by which the measures would notice a wrong scale of any method."""
CLIMB = ("refl", "draft", "draft-lv", "ddpo")


def configuration(method: str, length: int, **objective: float | str) -> AnalyticConfig:
    """A configuration with 20 steps and small networks."""
    rollout = RolloutConfig(trajectories=128, fraction=0.5, updates=4, batch=128)
    config = settings(method, updates=length, steps=20, width=64, samples=1000, rollout=rollout)
    config.objective = dataclasses.replace(config.objective, **objective)
    return config


def trained(config: AnalyticConfig, *when: int) -> tuple[Experiment, list[dict[str, float]]]:
    """The trained experiment, and its measures before and after so many updates."""
    subject = Experiment(config)
    records = [measure(subject, subject.evaluation_samples())]
    for update, _ in enumerate(updates(subject), 1):
        if update in when:
            records.append(measure(subject, subject.evaluation_samples()))
        if update == max(when):
            break
    return subject, records


def test_every_method_is_learned_with():
    assert {*BALANCE, *CLIMB} == set(SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "factor", "objective", "reaches"),
    [
        *((method, 1.0, {}, True) for method in BALANCE),
        *((method, 0.4, {}, False) for method in WEAKENED),
        ("residual-db", 1.0, {"reverse_target": "policy"}, True),
        ("residual-db", 1.0, {"reverse_target": "policy", "reverse_weight": 0.0}, False),
    ],
)
def test_balance_reaches_the_target_and_only_as_it_is(method, factor, objective, reaches):
    config = dataclasses.replace(configuration(method, BALANCE[method], **objective), reward_factor=factor)
    subject, (first, last) = trained(config, BALANCE[method])
    left = last["mode_mass_error"] / first["mode_mass_error"]
    moved = (last["reward"] - first["reward"]) / (subject.target.mean_reward(subject.reward) - first["reward"])
    assert (left < 0.5 and 0.55 < moved < 1.3) == reaches, (left, moved)


@pytest.mark.slow
@pytest.mark.parametrize("method", CLIMB)
def test_climbing_passes_the_target_and_collapses(method):
    """Each has the same seed as a run that sees minus the reward."""
    config = configuration(method, 80)
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=3e-3, schedule="constant")
    subject, (first, middle, last) = trained(config, 20, 80)
    _, (_, wrong) = trained(dataclasses.replace(config, reward_factor=-1.0), 20)
    assert wrong["reward"] < first["reward"] - 1 and middle["reward"] > first["reward"] + 0.3
    assert last["reward"] > subject.target.mean_reward(subject.reward) + 0.6
    assert last["mode_mass_error"] > 2 * first["mode_mass_error"]
    for name, share in (("effective_modes", 0.35), ("mode_width", 0.8)):
        assert last[name] < middle[name] < first[name] and last[name] < share * first[name], name
