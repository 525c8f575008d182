"""Distances from the pretrained model's samples, and their floor, on random features."""

import pytest
import torch
from torch import Tensor

from fastnabla.evaluation import reference_distances as module
from fastnabla.evaluation.reference_distances import FOLDS, reference_distances, reference_floor
from fastnabla.metrics.measures import Measures
from tests.checks import randn

PROMPTS = 2


def measures(count: int, seed: int, dimensions: int | None = 3, shift: float = 0.0) -> Measures:
    """`count` samples of each prompt. Prompts are far apart, and the reward numbers the samples."""
    total = PROMPTS * count
    prompt = torch.arange(PROMPTS).repeat_interleave(count)

    def features(width: int) -> Tensor:
        return randn(total, width, seed=seed, dtype=torch.float64) + 3 * prompt[:, None] + shift

    number = torch.arange(total, dtype=torch.float64) + 1000 * seed
    zeros = torch.zeros(total, dtype=torch.float64)
    own = None if dimensions is None else features(dimensions)
    return Measures(
        prompt=prompt, reward=number, total=number, parts={}, hue=zeros, dark=zeros, features=own, pixels=features(4)
    )


@pytest.mark.parametrize("dimensions", [1, 3, 300])
def test_features_of_any_width_are_compared(dimensions: int) -> None:
    near, far = (
        reference_distances(measures(10, 1, dimensions, shift), measures(20, 2, dimensions)) for shift in (0.0, 2.0)
    )
    assert len(near) == 8 and all(far[name] > near[name] for name in near)


def test_a_probe_without_features_leaves_pixels() -> None:
    found = reference_distances(measures(10, 1, None), measures(20, 2, None))
    assert len(found) == 4 and all(name.startswith("pixel_") for name in found)


def test_every_fold_splits_all_samples_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(first: Measures, second: Measures) -> dict[str, float]:
        seen.append((first, second))
        return {"number": float(len(seen))}

    monkeypatch.setattr(module, "reference_distances", watched)
    pretrained, reference = measures(2, 1), measures(7, 2)
    assert reference_floor(pretrained, reference) == {"number": {"mean": 2.5, "std": pytest.approx((5 / 3) ** 0.5)}}
    every = sorted([*pretrained.reward.tolist(), *reference.reward.tolist()])
    for first, second in seen:
        assert first.prompt.bincount().tolist() == [2, 2] and second.prompt.bincount().tolist() == [7, 7]
        assert sorted([*first.reward.tolist(), *second.reward.tolist()]) == every
    assert torch.equal(seen[0][0].reward, pretrained.reward) and torch.equal(seen[0][1].reward, reference.reward)
    firsts = torch.cat([first.reward for first, _ in seen])
    assert len(seen) == 4 and len(firsts.unique()) == len(firsts)
    seen.clear()
    reference_floor(pretrained, measures(100, 2))
    assert len(seen) == FOLDS


def test_one_fold_has_no_spread() -> None:
    pretrained, reference = measures(9, 1), measures(8, 2)
    exact = reference_distances(pretrained, reference)
    assert reference_floor(pretrained, reference) == {
        name: {"mean": pytest.approx(value), "std": None} for name, value in exact.items()
    }


@pytest.mark.slow
def test_the_floor_is_that_of_fresh_samples() -> None:
    """Of one model, within four standard errors over 40 draws. It is 0 for kernel distances and not for Fréchet's."""
    fresh: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    for draw in range(40):
        for name, value in reference_distances(measures(8, 4 * draw), measures(24, 4 * draw + 1)).items():
            fresh.setdefault(name, []).append(value)
        floor = reference_floor(measures(8, 4 * draw + 2), measures(24, 4 * draw + 3))
        for name, value in floor.items():
            floors.setdefault(name, []).append(value["mean"])
    for name in fresh:
        a, b = torch.tensor(fresh[name]), torch.tensor(floors[name])
        error = (a.var() / len(a) + b.var() / len(b)).sqrt().item()
        assert b.mean().item() == pytest.approx(a.mean().item(), abs=4 * error), name
        biased = b.mean() > 4 * b.std() / len(b) ** 0.5
        assert biased == ("frechet" in name), name
