"""Memory of rewards, known before anything is loaded, against a real pass."""

import functools

import pytest
import torch

from fastnabla.config.model_sections import RewardConfig
from fastnabla.cost import reward_bytes as module
from fastnabla.cost.reward_bytes import RewardBytes, image_bytes, reward_bytes
from fastnabla.rewards import RewardOptions
from fastnabla.rewards.inspection import value_and_gradient
from fastnabla.rewards.model import RewardModel
from fastnabla.utils.tensor_bytes import LiveBytes
from tests.golden_rewards import TINY


def tiny(name: str, options: RewardOptions) -> RewardModel:
    """With a tokenizer that makes no tensors, as the shipped ones."""
    reward = TINY[name](options)
    if name != "aesthetic":
        ids = [int(number) for number in reward.tokenize("0")]
        reward.tokenize = lambda prompt: ids
    return reward


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_an_image_takes_what_was_said(name: str, precision: str) -> None:
    """On tiny models: to a hundredth, and a kilobyte for numbers that are there once."""
    options = RewardOptions(precision=precision)
    reward, image = tiny(name, options), torch.rand(1, 3, 64, 64)
    value_and_gradient(reward, image, ["0"])  # the prompt is encoded
    with LiveBytes() as memory:
        value_and_gradient(reward, image, ["0"])
    assert image_bytes(tiny(name, options), (64, 64), "0") == pytest.approx(memory.peak, rel=0.01, abs=1000)


@pytest.mark.slow
def test_sizes_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's are made up here."""
    sizes = {"Aesthetic": 3_000, "PickScore": 50_000}
    monkeypatch.setattr(module, "image_bytes", lambda reward, size: sizes[type(reward).__name__] * size[0] // size[1])
    one, other = (reward_bytes(RewardConfig(terms=(term,)), (512, 256)) for term in ("aesthetic=1", "pickscore=2"))
    both = reward_bytes(RewardConfig(terms=("aesthetic=1", "pickscore=2", "area=8", "my.rewards:warm")), (512, 256))
    assert both == RewardBytes(one.weights + other.weights, 2 * 53_000)
    assert one.weights == pytest.approx(4 * 304e6, rel=0.01)  # CLIP's image tower, float32
    assert other.weights == pytest.approx(4 * 986e6, rel=0.01)


@functools.cache
def aesthetic_bytes(**settings: bool | str) -> RewardBytes:
    return reward_bytes(RewardConfig(terms=("aesthetic",), **settings), (512, 512))


@pytest.mark.slow
def test_recomputing_takes_less() -> None:
    kept, recomputed = aesthetic_bytes(), aesthetic_bytes(checkpoint=True)
    assert kept.weights == recomputed.weights
    assert recomputed.image < 0.3 * kept.image


@pytest.mark.slow
def test_bfloat16_takes_less() -> None:
    full, half = aesthetic_bytes(), aesthetic_bytes(precision="bf16")
    assert half.weights == pytest.approx(0.5 * full.weights, rel=0.02)  # what is not in its layers stays float32
    assert half.image < 0.6 * full.image


def test_no_networks_take_nothing() -> None:
    assert reward_bytes(RewardConfig(terms=("hue",)), (512, 512)) == RewardBytes(0, 0)
