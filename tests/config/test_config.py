"""Configuration: validation, round trip, presets."""

import dataclasses

import pytest

from fastnabla.config.model_sections import SamplerConfig
from fastnabla.config.presets import PRESETS
from fastnabla.config.train import TrainConfig, from_json, to_json
from fastnabla.config.training_sections import MemoryConfig, RolloutConfig
from fastnabla.objective.settings import Objective


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_json(preset: str) -> None:
    config = PRESETS[preset][1]
    assert from_json(to_json(config)) == config


def test_unknown_field_is_refused() -> None:
    text = to_json(TrainConfig()).replace('"seed"', '"sead"')
    with pytest.raises(ValueError, match="sead"):
        from_json(text)


@pytest.mark.parametrize("name", ["beta", "prior_weight", "reverse_weight", "trust_region_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_objective_weights_must_be_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"objective.{name}"):
        Objective(**{name: value})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SamplerConfig(eta=0.0), "sampler.eta = 0.0"),
        (lambda: SamplerConfig(steps=1), "sampler.steps = 1"),
        (lambda: SamplerConfig(min_sigma=0.0), "sampler.min_sigma = 0.0"),
        (lambda: SamplerConfig(min_sigma=float("nan")), "sampler.min_sigma = nan"),
        (lambda: SamplerConfig(spacing="linspace"), "sampler.spacing = 'linspace': ends at timestep 0.*trailing"),
        (lambda: RolloutConfig(trajectories=10, updates=4), "rollout.updates = 4: must divide"),
        (lambda: RolloutConfig(fraction=0.0), "rollout.fraction = 0.0"),
        (lambda: MemoryConfig(output_block=100), "memory.output_block = 100"),
        (lambda: TrainConfig(rollout=RolloutConfig(fraction=0.01)), "leaves no transition"),
        (lambda: TrainConfig(rollout=RolloutConfig(fraction=0.07)), "3 strata"),
        (lambda: TrainConfig(updates=5, rollout=RolloutConfig(updates=2)), "updates = 5: must be a multiple"),
        (lambda: TrainConfig(rollout=RolloutConfig(fraction=1.0, draw="uniform")), "rollout.fraction = 1.0"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_bad_values_name_field_and_value(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("steps", "fraction", "drawn"), [(20, 0.2, 4), (50, 0.1, 5), (10, 0.3, 3), (7, 1.0, 7)])
def test_drawn_steps_are_not_lost_to_rounding(steps: int, fraction: float, drawn: int) -> None:
    config = TrainConfig()
    rollout = dataclasses.replace(config.rollout, fraction=fraction, draw="uniform" if fraction < 1 else "stratified")
    assert TrainConfig(sampler=SamplerConfig(steps=steps), rollout=rollout).drawn_steps == drawn


def test_every_field_is_documented_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    from fastnabla.train import parse

    with pytest.raises(SystemExit):
        parse(["testbed", "--help"])
    text = capsys.readouterr().out
    sections = [f for f in dataclasses.fields(TrainConfig) if f.default_factory is not dataclasses.MISSING]
    for section in sections:
        for field in dataclasses.fields(section.default_factory):
            assert f"--{section.name}.{field.name}".replace("_", "-") in text
    assert "Rank and alpha" in text and "η, the scale of the noise" in text
