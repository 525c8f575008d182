"""Runs that learn from older rollouts: which policy sampled what, and resuming in every state of the buffer."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, OptimizerConfig, RolloutConfig
from fastnabla.cost.planner import buffer_bytes
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.objective.gaussian import guide
from fastnabla.run.resuming import AUTO, fingerprint, run_to_resume
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.sources import StoredTrajectories
from tests.checks import append_all
from tests.faults import assert_same_result, tiny
from tests.integration.test_inner_epochs import records_of, stop_after
from tests.run.test_resuming import PROMPTS, begun
from tests.runs import without_pictures


def replayed(replay: int, **changes) -> TrainConfig:
    """Three rollouts of two trajectories, each in two inner epochs of an update."""
    settings = RolloutConfig(trajectories=2, fraction=0.5, updates=1, epochs=2, replay=replay)
    evaluation = EvaluationConfig(every=0, samples=2, prompts=1)
    optimizer = OptimizerConfig(learning_rate=1e-2)
    base = dataclasses.replace(tiny(), updates=6, rollout=settings, evaluation=evaluation, optimizer=optimizer)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    without_pictures(Trainer.from_config(replayed(1))).train(folder)
    return folder


@pytest.mark.parametrize("replay", [0, 1, 2, 5])
def test_each_rollout_is_sampled_once_and_learned_from_in_order(replay: int) -> None:
    """Rollout n is sampled when the updates on rollout n − N begin, or at the start."""
    buffer, sampled = TrajectoryBuffer(2 * (1 + replay), 2, 2, (3,)), []

    def rollout(rollout_index: int) -> dict[str, float]:
        slots = buffer.reserve(torch.tensor([[1, 0]] * 2), torch.tensor([rollout_index] * 2))
        append_all(buffer, slots, torch.zeros(2, 3, 3), torch.zeros(2, 2, 3))
        sampled.append((rollout_index, current))
        return {"number": rollout_index}

    source = StoredTrajectories(rollout, buffer, torch.arange(2), 4, replay)
    for current in range(4):
        assert source.collect(current) == {"number": current} == source.collect(current)
        transitions = source.select(current, torch.tensor([1]), again=True)
        assert transitions.prompt.tolist() == [current] * 2 and transitions.again
        source.finish()
    assert sampled == [(n, max(n - replay, 0)) for n in range(4)]
    assert len(buffer) == 0 and not source.rollouts


@pytest.mark.slow
def test_updates_learn_from_what_the_policy_one_rollout_before_sampled(tmp_path: Path) -> None:
    """Of the policies as they were when updates on each rollout began, only that one's outputs are the stored ones. For the
    first two rollouts it is the pretrained policy."""
    trainer = without_pictures(Trainer.from_config(replayed(1)))
    step, trained, snapshots, calls, slots = trainer.step, trainer.policy.trained(), [], [], []

    @torch.no_grad()
    def error(batch, weights) -> float:
        now = {name: parameter.clone() for name, parameter in trained.items()}
        trainer.policy.load_state_dict({f"network.{name}": weight for name, weight in weights.items()}, strict=False)
        output = guide(
            trainer.policy(batch.x, trainer.table.timestep[batch.step_index], batch.prompt),
            trainer.policy.guidance_scale,
        )
        trainer.policy.load_state_dict({f"network.{name}": weight for name, weight in now.items()}, strict=False)
        return (output - batch.model_output).abs().max().item()

    def watched(selection):
        rollout_index, epoch = divmod(len(calls), 2)
        calls.append(None)
        if epoch == 0:
            snapshots.append({name: parameter.detach().clone() for name, parameter in trained.items()})
        batch = selection.gather(torch.arange(len(selection)))
        assert slots[rollout_index] == set(batch.trajectory.tolist()) and selection.again == bool(epoch)
        errors = [error(batch, weights) for weights in snapshots]
        author = max(rollout_index - 1, 0)
        assert errors[author] < 1e-5 and all(e > 1e-4 for i, e in enumerate(errors) if i != author), errors
        return step(selection)

    def recorded(rollout_index: int) -> dict[str, float]:
        metrics = collect(rollout_index)
        assert len(slots) == rollout_index
        slots.append(set(trainer.components.buffer.slots()[-2:].tolist()))
        return metrics

    for name in ("ops", "micro_batch", "replicated", "state_dict", "load_state_dict", "after_update"):
        setattr(watched, name, getattr(step, name))
    trainer.step = watched
    collect = trainer.source.rollout
    trainer.source.rollout = recorded
    trainer.train(tmp_path)
    assert len(calls) == 6
    rewards = [record["rollout_reward"] for record in records_of(tmp_path)]
    assert rewards[::2] == rewards[1::2] and len(set(rewards)) == 3


@pytest.mark.slow
def test_the_lag_starts_with_two_rollouts_of_the_pretrained_model(run: Path, tmp_path: Path) -> None:
    """Updates on the first rollout are those of the run without a lag, bit for bit; the second's trust region acts at once."""
    without_pictures(Trainer.from_config(replayed(0, updates=2))).train(tmp_path)
    ours = records_of(run)
    # The trust region's floor is known only where the update learns from the policy as it is.
    without = [
        {name: value for name, value in record.items() if name != "trust_floor"} for record in records_of(tmp_path)
    ]
    assert ours[:2] == without
    assert ours[0]["loss_trust_region"] < 1e-9 < ours[2]["loss_trust_region"]


@pytest.mark.slow
def test_resumed_between_inner_epochs_with_a_rollout_ahead(run: Path, tmp_path: Path) -> None:
    stop_after(without_pictures(Trainer.from_config(replayed(1))), tmp_path, 3)
    without_pictures(Trainer.from_config(replayed(1))).train(tmp_path, resume=True)
    assert_same_result(tmp_path, run)


@pytest.mark.slow
def test_resumed_after_a_signal_in_a_rollout(run: Path, tmp_path: Path) -> None:
    """Between rollouts: half of one is in the buffer beside one that is yet to be learned from."""
    trainer, stop, numbers = without_pictures(Trainer.from_config(replayed(1))), StopSignals(), []
    append = trainer.components.buffer.append

    def stopping(slots, step, *tensors):
        numbers.append(step)
        if len(numbers) == 5:  # in the first of two steps of the third rollout
            stop.received = signal.SIGTERM
        append(slots, step, *tensors)

    trainer.components.buffer.append = stopping
    with pytest.raises(Stopped):
        trainer.train(tmp_path, stop=stop)
    assert numbers == [0, 1, 0, 1, 0] and (tmp_path / "checkpoints/update-000002").is_dir()
    assert len(trainer.components.buffer) == 2 and len(trainer.source.rollouts) == 1
    without_pictures(Trainer.from_config(replayed(1))).train(tmp_path, resume=True)
    assert_same_result(tmp_path, run)


def test_the_buffer_has_room_for_the_rollouts_ahead() -> None:
    trainer = Trainer.from_config(replayed(2))
    assert isinstance(trainer.source, StoredTrajectories) and trainer.components.buffer.capacity == 6
    assert trainer.components.buffer.nbytes == buffer_bytes(
        trainer.config, torch.Size(trainer.components.sample_shape), 6
    )


def test_ddpo(tmp_path: Path) -> None:
    """Ratios are of densities to those that the stored outputs give. A reward is taken into account once."""
    trainer = without_pictures(Trainer.from_config(replayed(1, method="ddpo", updates=4)))
    trainer.train(tmp_path)
    records = records_of(tmp_path)
    # Rollout and update may round the first ones apart, by a few units of float32.
    off = [abs(record["ratio"] - 1) for record in records]
    assert off[0] < 1e-5 and min(off[1:]) > 1e-4
    assert int(trainer.step.statistics.seen.sum()) == 4
    assert all(
        record[f"passes_{kind}"] == 2 for record in records for kind in ("inner", "last") if record[f"rows_{kind}"]
    )


def test_a_lag_depends_on_the_length_of_the_run(tmp_path: Path) -> None:
    """A longer one would have sampled ahead in its last updates."""
    config = replayed(1)
    longer = dataclasses.replace(config, updates=8)
    assert fingerprint(longer, PROMPTS) != fingerprint(config, PROMPTS)
    assert fingerprint(replayed(0, updates=8), PROMPTS) == fingerprint(replayed(0), PROMPTS)
    begun(tmp_path / "run", config)
    with pytest.raises(ValueError, match=r"cannot be extended with rollout\.replay = 1"):
        run_to_resume(dataclasses.replace(longer, resume=AUTO, run=tmp_path / "run"))
