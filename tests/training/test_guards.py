"""Updates and samples that are not finite."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastnabla.methods.accumulation import StepReport
from fastnabla.methods.nabla_db import ROWS, STATISTICS
from fastnabla.methods.zero_gradients import DRIVE, REWARD_GRADIENT, ZeroGradientError, largest, require_connected
from fastnabla.training.guards import Guard
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.finite_samples import finite_samples
from tests.faults import tiny
from tests.runs import interrupt, without_pictures

PROMPTS, TIMESTEP = ("a cat", "a dog"), torch.tensor([900, 600, 300])
NORMS = {"grad_norm_lora": torch.tensor(2.0), "grad_norm_flow": torch.tensor(3.0)}


def report(rows: int = 4, **bad: int) -> StepReport:
    """Of `rows` transitions, all finite but for the statistics in `bad` in the row given there."""
    values = {name: torch.ones(rows) for name in (*ROWS, *STATISTICS)}
    values |= {"step_index": torch.arange(rows) % 3, "prompt": torch.arange(rows) % 2}
    for name, row in bad.items():
        values[name][row] = float("nan")
    losses = {"loss": values["loss_forward"].mean()}
    return StepReport(
        losses=losses,
        rows=values,
        statistics={},
        counts={"inner": 2, "last": 1},
        passes={"inner": 7.0, "last": 3.0},
        signals={DRIVE: largest(values["loss_forward"]), REWARD_GRADIENT: largest(values["norm_reward"])},
        path="the path",
    )


def guard(most: int = 3, skipped: int = 0) -> Guard:
    return Guard(PROMPTS, TIMESTEP, most, skipped)


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.count += function.__name__ in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__")
        return function(*arguments, **(options or {}))


def test_a_finite_update_is_accepted_for_one_read_however_large_it_is() -> None:
    watched, watch = report(rows=1000), guard()
    with Reads() as reads:
        assert watch.accepts(1, watched, NORMS)
    assert reads.count == 1


def test_what_is_not_finite_is_named_with_timestep_and_prompt(caplog: pytest.LogCaptureFixture) -> None:
    assert not guard().accepts(8, report(loss_forward=1, norm_reward=1), NORMS)
    assert "update 8 is skipped (1 in a row)" in caplog.text
    assert "Not finite: loss_forward, norm_reward at timestep 600 of a sample for 'a dog'" in caplog.text
    assert caplog.text.count("timestep") == 1


def test_many_transitions_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    bad = report(rows=9)
    bad.rows["loss_forward"][:] = float("inf")
    bad.losses["loss"] = bad.rows["loss_forward"].sum()
    assert not guard().accepts(1, bad, NORMS)
    assert caplog.text.count("timestep") == 3 and "and 6 other rows" in caplog.text


def test_gradients_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert not guard().accepts(1, report(), NORMS | {"grad_norm_flow": torch.tensor(float("inf"))})
    assert "Not finite: grad_norm_flow, though each transition's loss is finite" in caplog.text


def test_a_zero_gradient_is_an_error_unless_nothing_drives_it() -> None:
    zero = NORMS | {"grad_norm_lora": torch.tensor(0.0)}
    with pytest.raises(ZeroGradientError, match=r"update 5: the gradient of the policy's weights.*the path.*--compute"):
        guard().accepts(5, report(), zero)
    settled = report()
    settled.signals[DRIVE] = torch.tensor(0.0)
    assert guard().accepts(5, settled, zero)


def test_a_zero_reward_gradient_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    without = report()
    without.signals[REWARD_GRADIENT] = torch.tensor(0.0)
    with pytest.raises(ZeroGradientError, match=r"update 5: the reward's gradient is zero in every row.*the path"):
        guard().accepts(5, without, NORMS)
    assert Guard(PROMPTS, TIMESTEP, 3, clips=True).accepts(5, without, NORMS)
    assert "update 5: no reward has a gradient; all may be beyond reward.clip" in caplog.text
    del without.signals[REWARD_GRADIENT]  # of a method that asks for values alone
    assert guard().accepts(5, without, NORMS)


def test_a_lora_that_the_loss_does_not_depend_on_is_an_error() -> None:
    gradients, names = [torch.ones(1), None], ["first", "second"]
    with pytest.raises(ZeroGradientError, match=r"1 of 2 trained weights, such as second \(the path\)"):
        require_connected(gradients, names, True, "the path")
    require_connected(gradients, names, False, "the path")
    with pytest.raises(ZeroGradientError, match="2 of 2"):
        require_connected([None, None], names, False, "the path")


@pytest.mark.slow
def test_a_run_that_would_learn_nothing_stops(tmp_path: Path) -> None:
    """A fast path that loses the gradient of the LoRA, and one that loses the reward's."""
    for folder in ("lora", "reward"):
        (tmp_path / folder).mkdir()
    trainer = without_pictures(Trainer.from_config(tiny()))
    gradients = trainer.step._differentiate
    trainer.step._differentiate = lambda loss: [torch.zeros_like(gradient) for gradient in gradients(loss)]
    with pytest.raises(ZeroGradientError, match=r"update 1: the gradient of the policy's weights.*compile = 'none'"):
        trainer.train(tmp_path / "lora")
    trainer = without_pictures(Trainer.from_config(tiny()))
    decoder, gradient_of = trainer.step.decoder, trainer.step.decoder.reward_gradient

    def lost(*arguments):
        rewards, gradient = gradient_of(*arguments)
        return rewards, torch.zeros_like(gradient)

    decoder.reward_gradient = lost
    with pytest.raises(ZeroGradientError, match=r"update 1: the reward's gradient.*reward_gradient = 'lookahead'"):
        trainer.train(tmp_path / "reward")


def test_so_many_in_a_row_end_the_run_with_a_diagnosis() -> None:
    watch = guard(most=2)
    for update, bad in enumerate([{"loss_forward": 0}, {}, {"loss_forward": 0}, {"loss_forward": 2, "norm_reward": 2}]):
        assert watch.accepts(update, report(**bad), NORMS) == (not bad)
        if update < 3:
            watch.check(update)
    with pytest.raises(
        FloatingPointError, match=r"after update 3.*max_skipped = 2.*timestep 300.*'a cat'.*reward\.clip"
    ):
        watch.check(3)
    resumed = guard(most=2, skipped=1)
    assert not resumed.accepts(4, report(loss_forward=0), NORMS)
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        resumed.check(4)


def test_samples_that_are_not_finite_are_named(caplog: pytest.LogCaptureFixture) -> None:
    latents, parts = torch.zeros(3, 2, 4, 4), {"hue": torch.zeros(3), "area": torch.zeros(3)}
    prompts = ["a", "b", "c"]
    assert finite_samples(latents, parts, prompts).tolist() == [True] * 3
    assert not caplog.text
    latents[1, 0, 2, 3] = float("inf")
    parts["area"][2] = float("nan")
    assert finite_samples(latents, parts, prompts).tolist() == [True, False, False]
    assert "in 2 of 3 samples: the latents for 'b'; reward 'area' for 'c'" in caplog.text
    parts["hue"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="in 3 of 3 samples: reward 'hue' for 'a'"):
        finite_samples(latents, parts, prompts)


def spoil(trainer: Trainer, updates: Sequence[int]) -> None:
    """Give the updates numbered `updates`, from 1, a reward whose gradient is NaN for the first image of a call."""
    update, calls = trainer.update, []
    ((name, (reward, weight)),) = list(trainer.components.reward.terms.items())[:1]
    now = {"bad": False}

    def spoilt(images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = reward(images, prompts)
        factor = torch.ones_like(values)
        factor[0] = float("nan")
        return values * factor if now["bad"] and images.requires_grad else values

    def counted(*arguments):
        calls.append(arguments)
        now["bad"] = len(calls) in updates
        update(*arguments)

    trainer.components.reward.terms[name] = (spoilt, weight)
    trainer.update = counted


def records(run: Path) -> list[dict]:
    return [record for record in map(json.loads, (run / "metrics.jsonl").open()) if record["phase"] == "train"]


@pytest.mark.slow
def test_a_spoilt_update_is_skipped_in_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, weights = without_pictures(Trainer.from_config(tiny())), []
    spoil(trainer, [3])
    update = trainer.optimizer.update

    def watched(*arguments):
        norms = update(*arguments)
        weights.append([parameter.detach().clone() for parameter in trainer.policy.trainable()])
        return norms

    trainer.optimizer.update = watched
    trainer.train(tmp_path)
    assert [record["skipped"] for record in records(tmp_path)] == [0, 0, 1, 0, 0, 0]
    same = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
    assert same == [False, True, False, False, False]
    assert all(parameter.isfinite().all() for parameter in weights[-1])
    assert "update 3 is skipped" in caplog.text and "norm_reward" in caplog.text
    assert any(f"timestep {t:g} of a sample for 'a" in caplog.text for t in trainer.table.timestep.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddpo", "dag-kl"])
def test_an_update_of_samples_without_a_finite_reward_is_skipped(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first sample of the second rollout, which is all that update 3 learns from."""
    trainer = without_pictures(Trainer.from_config(dataclasses.replace(tiny(), method=method)))
    of_rollout, rollouts = trainer.components.reward.parts, []

    def spoilt(*arguments):
        parts = of_rollout(*arguments)
        if rollouts[-1] == 1:
            parts["hue"][0] = float("nan")
        return parts

    sample = trainer.source.rollout

    def counted(rollout_index: int) -> dict[str, float]:
        rollouts.append(rollout_index)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(trainer.components.reward, "parts", spoilt)
            return sample(rollout_index)

    trainer.source.rollout = counted
    trainer.train(tmp_path)
    assert [record["skipped"] for record in records(tmp_path)] == [0, 0, 1, 0, 0, 0]
    assert [record["rollout_reward_std"] for record in records(tmp_path)[2:4]] == [0, 0]  # of the other sample
    named = {"ddpo": "advantage", "dag-kl": "residual"}[method]
    assert f"update 3 is skipped (1 in a row). Not finite: {named} at timestep" in caplog.text


@pytest.mark.slow
def test_skipped_updates_are_counted_across_a_resume(tmp_path: Path) -> None:
    """Two skipped, a checkpoint, the end; then two more make four."""
    config = dataclasses.replace(tiny(), max_skipped=4)
    first = without_pictures(Trainer.from_config(config))
    spoil(first, [1, 2, 3])
    interrupt(first, 3)
    with pytest.raises(KeyboardInterrupt):
        first.train(tmp_path)
    second = without_pictures(Trainer.from_config(config))
    spoil(second, [1, 2, 3])
    with pytest.raises(FloatingPointError, match="after update 4, and 4 updates in a row"):
        second.train(tmp_path, resume=True)
    assert [record["skipped"] for record in records(tmp_path)] == [1] * 4
