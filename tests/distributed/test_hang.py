"""Whose main thread hangs: what counts as progress, what is excused, and who only waits for another."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny

from fastnabla.distributed.beacon import BEACON, Beacon
from fastnabla.distributed.hang import HangLimit
from fastnabla.metrics.diversity import mean_distance
from fastnabla.metrics.measures import probe_features
from fastnabla.models.decoder import Decoder
from fastnabla.rewards import RewardSum
from fastnabla.training.trainer import Trainer
from tests.models.test_policy import PROMPT, TIMESTEP, X
from tests.models.test_policy import build as build_policy


def exceeded(beacon: Beacon, seconds: int, others: list[int], between: Callable[[], None] = lambda: None) -> int | None:
    """The second in which a limit of 10 s is exceeded; None if it is not within `seconds`."""
    limit = HangLimit(10.0, beacon)
    for second in range(seconds):
        if limit.is_exceeded(1.0, lambda: others):
            return second
        between()
    return None


def test_a_rank_without_progress_hangs() -> None:
    assert exceeded(Beacon(), 60, [0, 0]) == 11
    beacon = Beacon()
    assert exceeded(beacon, 60, [0, 0], beacon.advance) is None
    assert exceeded(beacon, 60, [0, 0]) == 11


def test_an_excused_rank_does_not_hang() -> None:
    beacon = Beacon()
    with beacon.excused():
        with beacon.excused():
            pass
        assert exceeded(beacon, 60, [0]) is None
    with beacon.collective():
        assert exceeded(beacon, 60, [0]) is None
    assert exceeded(beacon, 60, [1]) == 11


def test_a_rank_that_waits_in_a_read_for_one_that_is_behind_does_not_hang() -> None:
    """As on GPUs, where a collective operation returns at once."""
    ahead, others = Beacon(), [1, 0]
    with ahead.collective():
        pass
    assert exceeded(ahead, 60, others) is None
    others[1] = 1
    assert exceeded(ahead, 60, others) == 11


class Probe:
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_steps() -> None:
    images, texts, policy = torch.rand(2, 3, 8, 8), ["a", "b"], build_policy()
    decoder = Decoder(AutoencoderTiny(decoder_block_out_channels=(8, 8, 8, 8), encoder_block_out_channels=(8, 8, 8, 8)))
    reward = RewardSum({"mean": (lambda images, prompts: images.mean((1, 2, 3)), 1.0)})
    steps = {
        "network pass": lambda: policy(X, TIMESTEP, PROMPT),
        "decoding": lambda: decoder(torch.zeros(1, 4, 2, 2)),
        "reward": lambda: reward(images, texts),
        "probe": lambda: probe_features(images, Probe()),
        "distance": lambda: mean_distance(images, torch.zeros(2), lambda a, b: (a - b).flatten(1).norm(dim=1)),
    }
    for name, step in steps.items():
        before = BEACON.progress
        step()
        assert BEACON.progress != before, name


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_reward_with_a_limit_of_its_own_is_excused(timeout: float | None) -> None:
    seen = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append(BEACON.progress is None)
        return images.mean((1, 2, 3))

    RewardSum({"mean": (reward, 1.0)}, timeout=timeout)(torch.rand(2, 3, 8, 8), ["a", "b"])
    assert seen == [timeout is not None] and BEACON.progress is not None


def test_a_checkpoint_is_excused() -> None:
    seen = []
    files = SimpleNamespace(save=lambda progress, wait: seen.append(BEACON.progress))
    Trainer.save(SimpleNamespace(files=files, done=3, source=SimpleNamespace(rollouts=[])))
    assert seen == [None] and BEACON.progress is not None
