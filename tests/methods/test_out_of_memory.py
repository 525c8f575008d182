"""Running out of memory halves the micro-batch and repeats the work, with the same result."""

import dataclasses

import pytest
import torch
from torch import nn

from fastnabla.methods.nabla_db import BalanceStep
from tests.checks import assert_gradients
from tests.golden import GoldenStep
from tests.methods.test_sharing import batch as adjacent
from tests.small_step import shared_step


class Limited(nn.Module):
    """A reward that runs out of memory, forwards or backwards, with more than `most` images."""

    def __init__(self, reward: nn.Module, most: int, backwards: bool = False) -> None:
        super().__init__()
        self.reward, self.most, self.backwards, self.failures = reward, most, backwards, 0

    def fail(self, *_):
        self.failures += 1
        raise torch.OutOfMemoryError("simulated")

    def forward(self, images, prompts):
        if len(images) > self.most and not self.backwards:
            self.fail()
        values = self.reward(images, prompts)
        if len(images) > self.most:
            values.register_hook(self.fail)
        return values


def limited(golden: GoldenStep, most: int, backwards: bool) -> GoldenStep:
    return dataclasses.replace(golden, reward=Limited(golden.reward, most, backwards))


def clear(step: BalanceStep) -> None:
    for parameter in step.parameters:
        parameter.grad = None


@pytest.mark.slow
@pytest.mark.parametrize("reuse_passes", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_halves_and_repeats(backwards, reuse_passes, caplog):
    golden = shared_step()
    transitions = adjacent(golden)
    expected_step = golden.step(100, reuse_passes=reuse_passes)
    clear(expected_step)
    expected = expected_step(transitions)
    gradients = {name: gradient.clone() for name, gradient in golden.gradients().items()}

    tight = limited(golden, 4, backwards)
    step = tight.step(100, reuse_passes=reuse_passes)
    clear(step)
    report = step(transitions)
    assert tight.reward.failures >= 1
    assert step.micro_batch == 3  # half of the six inner ones; as many images are decoded at once
    assert_gradients(golden.gradients(), gradients)
    assert len(report.rows["trust"]) == len(transitions)
    torch.testing.assert_close(report.losses["loss"], expected.losses["loss"], rtol=1e-5, atol=0)
    assert report.passes["last"] == 3
    assert "out of memory" in caplog.text

    failures = tight.reward.failures
    clear(step)
    step(transitions)
    assert tight.reward.failures == failures  # the smaller size is kept


def test_gradients_of_earlier_calls_stay():
    golden = shared_step()
    transitions = adjacent(golden)
    step = golden.step(100)
    clear(step)
    step(transitions)
    step(transitions)
    twice = {name: gradient.clone() for name, gradient in golden.gradients().items()}
    clear(step)
    step(transitions)
    limited(golden, 4, True).step(100)(transitions)
    assert_gradients(golden.gradients(), twice)


@pytest.mark.parametrize("backwards", [False, True])
def test_rewards_of_finished_samples_are_halved_too(backwards, caplog):
    """With terminal gradients the step decodes before the first network pass."""
    golden = shared_step()
    transitions = adjacent(golden)
    whole = golden.step(100, reward_gradient="terminal")
    clear(whole)
    expected = whole(transitions)
    gradients = {name: gradient.clone() for name, gradient in golden.gradients().items()}

    tight = limited(golden, 1, backwards)
    step = tight.step(100, reward_gradient="terminal")
    clear(step)
    report = step(transitions)
    assert tight.reward.failures == 2  # with three samples, and with two
    assert step.micro_batch == 1
    assert caplog.text.count("out of memory") == 2
    assert_gradients(golden.gradients(), gradients)
    torch.testing.assert_close(report.losses["loss"], expected.losses["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reward_gradient", ["lookahead", "terminal"])
def test_gives_up_when_nothing_is_left_to_halve(reward_gradient):
    golden = shared_step()
    step = limited(golden, 0, False).step(4, reward_gradient=reward_gradient)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        step(golden.transitions)
