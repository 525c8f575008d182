"""A probe whose features are not finite affects only the metrics that use them."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastnabla import train
from fastnabla.evaluation.run import RunEvaluation
from fastnabla.metrics.evaluation import Evaluator
from fastnabla.metrics.measures import probe_features
from fastnabla.rewards import RewardSum
from tests.integration.test_extending import QUICK

BROKEN = """
import torch
calls = 0
class Probe:
    def features(self, images):
        global calls
        calls += 1
        features = images.flatten(1)[:, :5].clone()
        if calls > 2:  # the first two are of the pretrained model
            features[0] = float("nan")
        return features
"""
NEED_FEATURES = {"pairwise_distance", "vendi", "prior_distance"}


class Probe:
    def __init__(self, bad: float) -> None:
        self.bad = bad

    def features(self, images: torch.Tensor) -> torch.Tensor:
        features = images.flatten(1)[:, :5].clone()
        features[1] = self.bad
        return features


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_needs_the_features_is_nan_and_the_probe_is_named(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardSum({"mean": (lambda images, prompts: images.mean((1, 2, 3)), 1.0)})
    evaluator = Evaluator(lambda *_: None, None, reward, Probe(bad), ["a", "b"], 3)
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    evaluator.set_prior(images)
    caplog.clear()
    metrics = evaluator.measure(images)
    assert {name for name, value in metrics.items() if not math.isfinite(value)} == NEED_FEATURES
    assert (
        "the probe tests.evaluation.test_broken_probe.Probe gives features that are not finite or all zero for 1 of 6 images"
        in (caplog.text)
    )


def test_sound_features_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    assert probe_features(torch.ones(3, 3, 4, 4), Probe(1.0)).shape == (3, 5)
    assert not caplog.text


def test_evaluating_a_run_with_it_is_refused() -> None:
    evaluation = object.__new__(RunEvaluation)
    evaluation.components = SimpleNamespace(config=SimpleNamespace(evaluation=SimpleNamespace(probe="mine:Probe")))

    @dataclasses.dataclass
    class Seen:
        features: torch.Tensor | None
        hue: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))
        reward: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))

    for sound in (Seen(torch.ones(2, 3)), Seen(None)):
        assert evaluation._required(sound, ["a cat"]) is sound
    with pytest.raises(ValueError, match=r"evaluation\.probe = 'mine:Probe'.*--probe"):
        evaluation._required(Seen(torch.tensor([[1.0, torch.nan]])), ["a cat"])


@pytest.mark.slow
def test_a_run_goes_on_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("broken_probe.py").write_text(BROKEN)
    command = [*QUICK, "--run=run", "--updates=1", "--evaluation.probe=broken_probe:Probe"]
    assert train.main(command) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    before, after = (record for record in records if record["phase"] == "evaluate")
    assert all(isinstance(before[name], float) for name in NEED_FEATURES)
    assert {name for name, value in after.items() if value is None} == NEED_FEATURES
    assert "the probe broken_probe.Probe gives" in caplog.text
