"""An evaluation with one image that is not finite goes on, and no metric hides the image."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastnabla.evaluation.run import RunEvaluation
from fastnabla.metrics.diversity import HUE_BINS, hue_entropy, hue_histogram
from fastnabla.metrics.evaluation import Evaluator
from fastnabla.metrics.joint_entropy import joint_entropy
from fastnabla.metrics.measures import measure_images
from fastnabla.metrics.probes import build_probe
from fastnabla.rewards import build_reward
from fastnabla.run.pictures import save_pictures
from fastnabla.run.table import final_table
from fastnabla.run.tracker import Tracker

PROMPTS = ["a bear", "a horse"]
SAMPLES = 3
OF_ALL = {"reward", "reward_std", "reward_hue", "hue_entropy", "joint_entropy", "dark_grounds"}
OF_FEATURES = {"pairwise_distance", "vendi", "prior_distance"}


def images(spoilt: int | None = None) -> torch.Tensor:
    drawn = torch.rand(len(PROMPTS) * SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if spoilt is not None:
        drawn[spoilt] = torch.nan
    return drawn


@pytest.mark.parametrize("probe", ["testbed", "pixels", "none"])
def test_the_metrics_are_null_and_the_run_goes_on(probe: str, tmp_path: Path) -> None:
    evaluator = Evaluator(lambda *_: None, None, build_reward(["hue=1"]), build_probe(probe, "cpu"), PROMPTS, SAMPLES)
    evaluator.set_prior(images())
    tracker = Tracker(tmp_path, "none", {})
    tracker.log("evaluate", 0, evaluator.measure(images()))
    metrics = evaluator.measure(images(spoilt=1))
    nothing = OF_ALL | (set() if probe == "none" else OF_FEATURES)
    assert {name for name, value in metrics.items() if not math.isfinite(value)} == nothing

    tracker.log("evaluate", 1, metrics)
    tracker.close()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name for name, value in last.items() if value is None} == nothing
    save_pictures(tmp_path, tracker.records, {"before": images(), "after": images(spoilt=1)}, PROMPTS)
    assert "not finite" in list(final_table(list(tracker.records), SAMPLES).columns[2].cells)


def test_each_image_has_its_own_measures() -> None:
    prompt, texts = torch.tensor([0, 0, 0, 1, 1, 1]), [text for text in PROMPTS for _ in range(SAMPLES)]
    seen, spoilt = (
        measure_images(each, prompt, texts, build_reward(["hue=1"]), None) for each in (images(), images(spoilt=1))
    )
    for name in ("total", "hue", "dark"):
        values = getattr(spoilt, name)
        assert values.isnan().tolist() == [False, True, False, False, False, False]
        assert torch.equal(values[2:], getattr(seen, name)[2:])


def test_entropies_and_the_histogram_are_nan() -> None:
    hues, prompt = torch.tensor([0.1, torch.nan, 0.3, 0.4]), torch.tensor([0, 0, 1, 1])
    dark = torch.tensor([0.0, torch.nan, 1.0, 1.0])
    assert math.isnan(hue_entropy(hues, prompt)) and math.isnan(joint_entropy(hues, dark, prompt))
    assert hue_histogram(hues, torch.full((4,), 0.25)).isnan().tolist() == [True] * HUE_BINS


def test_the_classifier_does_not_recognise_it() -> None:
    """Not even as a bear: torch takes the first NaN for the largest logit, which is the bear's."""
    nothing = torch.full((2, 3, 32, 32), torch.nan)
    assert build_probe("testbed", "cpu").is_correct(nothing, PROMPTS).tolist() == [False, False]


@pytest.mark.parametrize("probe", ["pixels", "none"])
def test_comparing_its_run_is_refused(probe: str) -> None:
    """With a probe, that cannot measure it either, the samples are blamed."""
    evaluation = object.__new__(RunEvaluation)
    evaluation.run = Path("runs/mine")
    evaluation.components = SimpleNamespace(config=SimpleNamespace(evaluation=SimpleNamespace(probe=probe)))
    measures = measure_images(
        images(spoilt=1), torch.zeros(6), ["a horse"] * 6, build_reward(["hue=1"]), build_probe(probe, "cpu")
    )
    with pytest.raises(ValueError, match=r"'runs/mine': 1 of 6 samples or their rewards are not finite.*--weights"):
        evaluation._required(measures, ["a horse"])
