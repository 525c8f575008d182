"""Inner epochs: which update learns from what, and what later ones take from the cache."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch

from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import RolloutConfig
from fastnabla.cost.planner import cache_bytes
from fastnabla.cost.update_cost import rollout_passes
from fastnabla.distributed.signals import Stopped, StopSignals
from fastnabla.methods.passes import planned_passes
from fastnabla.methods.registry import STEPS
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.reference_cache import ReferenceCache
from fastnabla.trajectories.sources import learning_order
from tests.checks import BACKENDS, append_all, assert_gradients
from tests.faults import assert_same_result, tiny
from tests.golden import GoldenStep
from tests.runs import without_pictures
from tests.small_step import small_step

EPOCHS = RolloutConfig(trajectories=4, fraction=0.5, updates=2, epochs=3)


def inner(method: str = "residual-db", **changes) -> TrainConfig:
    """Two rollouts of two trajectories; one update in each of two inner epochs."""
    rollout = RolloutConfig(trajectories=2, fraction=0.5, updates=1, epochs=2)
    return dataclasses.replace(tiny(), method=method, updates=4, rollout=rollout, **changes)


def records_of(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "train"]


def test_every_inner_epoch_goes_over_all_trajectories() -> None:
    orders = learning_order(0, 0, EPOCHS)
    assert [len(part) for part in orders] == [2] * 6
    epochs = [torch.cat(orders[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert epochs[0] == [0, 1, 2, 3] and all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    large = dataclasses.replace(EPOCHS, trajectories=100)
    rounds = [torch.stack(learning_order(seed, index, large)).flatten(0) for seed, index in ((0, 0), (0, 1), (1, 0))]
    later = [order.view(3, 100)[epoch].tolist() for order in rounds for epoch in (1, 2)]
    assert len(set(map(tuple, later))) == 6  # of 2 to the 50th: all of their own
    # Whichever consecutive trajectories of an update a rank has, it has as many of every update.
    assert all(
        torch.equal((part % 50).sort().values, torch.arange(50)) for order in rounds for part in order.view(6, 50)
    )
    assert torch.equal(torch.stack(learning_order(0, 1, large)), rounds[1].view(6, 50))


def gradients(golden: GoldenStep, step, selection) -> tuple:
    for parameter in step.parameters:
        parameter.grad = None
    report = step(selection)
    return report, {name: gradient.clone() for name, gradient in golden.gradients().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"prior_weight": 1.0, "gamma": "alpha_bar"},
        {"reward_gradient": "terminal"},
        {"reward_gradient": "lookahead_detached", "reverse_weight": 0.0},
        {"reverse_second_order": True},
    ],
    ids=str,
)
def test_gradients_from_the_cache(changes: dict) -> None:
    compare_with_cache(small_step(), "torch", **changes)


@pytest.mark.slow
def test_gradients_from_the_cache_without_a_flow() -> None:
    compare_with_cache(small_step().without_flow(), "torch", reverse_weight=0.0, prior_weight=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_from_the_cache_through_kernels(backend: str) -> None:
    compare_with_cache(small_step(), backend)


def compare_with_cache(golden: GoldenStep, backend: str, **changes) -> None:
    """After the policy and g_φ have moved, gradients with the cache are those without, to float32 rounding: guidance is
    the same arithmetic, before the cache instead of behind it. Micro-batches are cut differently the second time."""
    step, count = golden.step(2, backend, **changes), golden.inputs["timesteps"].shape[1]  # one trajectory
    with_flow = golden.flow is not None
    with_product = with_flow and step.objective.reverse_weight > 0
    cache = ReferenceCache(count, 1, tuple(golden.transitions.x.shape[1:]), with_product, torch.device("cpu"))
    plain = golden.transitions[:count].select()
    kept = dataclasses.replace(plain, reference=cache.of(torch.arange(count)))

    _, before = gradients(golden, step, plain)
    report, actual = gradients(golden, step, kept)
    assert all(torch.equal(actual[name], before[name]) for name in before), "filling it changes nothing"
    assert tuple(report.passes.values()) == planned_passes(step.objective, with_flow)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in step.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    _, expected = gradients(golden, step, plain)
    assert any(not torch.allclose(before[name], expected[name], rtol=0.1) for name in expected)
    step.micro_batch = 3
    report, actual = gradients(golden, step, kept)
    assert_gradients(actual, expected)
    assert tuple(report.passes.values()) == planned_passes(step.objective, with_flow, cached=True)


@pytest.mark.slow
def test_the_cache_decides() -> None:
    """What is read is what was kept: a wrong product, or a wrong output, changes the gradients. A micro-batch of which
    something is not known is computed again, and kept."""
    golden = small_step()
    step, count = golden.step(100, "torch"), golden.inputs["timesteps"].shape[1]
    cache = ReferenceCache(count, 1, tuple(golden.transitions.x.shape[1:]), True, torch.device("cpu"))
    kept = dataclasses.replace(golden.transitions[:count].select(), reference=cache.of(torch.arange(count)))
    _, expected = gradients(golden, step, kept)
    cache.output[1], cache.known[1] = float("nan"), False
    _, actual = gradients(golden, step, kept)
    assert_gradients(actual, expected)
    assert bool(cache.known.all())
    for name, part in (("product", "grad.flow."), ("output", "grad.lora.")):
        slab = getattr(cache, name)
        slab += 1
        _, actual = gradients(golden, step, kept)
        assert any(not torch.allclose(actual[n], expected[n], rtol=0.1) for n in expected if n.startswith(part))
        slab -= 1


def test_forgetting() -> None:
    """Oldest or newest; the ring goes on behind what is left, and a slot that is used anew has nothing in the cache."""
    buffer = TrajectoryBuffer(4, 2, 2, (3,))
    buffer.keep_reference(with_product=True)
    steps = torch.tensor([[1, 0]])

    def reserve(prompt: int) -> int:
        slots = buffer.reserve(steps, torch.tensor([prompt]))
        append_all(buffer, slots, torch.full((1, 3, 3), float(prompt)), torch.zeros(1, 2, 3))
        return slots.item()

    def there() -> list[int]:
        return buffer.gather(buffer.transitions()).prompt[::2].tolist()

    assert [reserve(prompt) for prompt in range(4)] == [0, 1, 2, 3]
    for slot in range(4):
        buffer.reference.of(buffer.transitions(torch.tensor([slot]))).write(torch.zeros(2, 3), torch.zeros(2, 3))
    buffer.forget(1)
    buffer.forget(1, newest=True)
    assert there() == [1, 2] and buffer.slots().tolist() == [1, 2]
    assert buffer.reference.known.view(4, 2).all(1).tolist() == [False, True, True, False]
    assert [reserve(prompt) for prompt in (4, 5)] == [3, 0] and there() == [1, 2, 4, 5]
    assert buffer.select().reference.read() is None
    assert buffer.select(torch.tensor([1, 2])).reference.read() is not None
    state = buffer.state_dict()
    other = TrajectoryBuffer(4, 2, 2, (3,))
    other.keep_reference(with_product=True)
    other.load_state_dict(state)
    assert torch.equal(other.reference.known, buffer.reference.known) and len(other) == 4
    with pytest.raises(ValueError, match=r"count = 5: must be between 0 and 4"):
        buffer.forget(5)
    with pytest.raises(ValueError, match=r"the state lacks reference"):
        other.load_state_dict(TrajectoryBuffer(4, 2, 2, (3,)).state_dict())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    without_pictures(Trainer.from_config(inner())).train(folder)
    return folder


@pytest.mark.slow
def test_measured_passes_are_the_planned_ones(run: Path) -> None:
    config, records = inner(), records_of(run)
    first, later = (planned_passes(config.objective, True, cached=cached) for cached in (False, True))
    assert (first, later) == ((7, 3), (5, 2))
    for update, record in enumerate(records):
        planned = dict(zip(("inner", "last"), later if update % 2 else first, strict=True))
        assert all(record[f"passes_{kind}"] == planned[kind] for kind in planned if record[f"rows_{kind}"])
    assert STEPS["residual-db"].cost(config).passes == {"inner": 6, "last": 2.5}
    assert rollout_passes(config) == 2 * 2 / 2
    rewards = [record["rollout_reward"] for record in records]
    assert rewards[0] == rewards[1] != rewards[2] == rewards[3]
    # On-policy in the first inner epoch alone.
    trust = [record["loss_trust_region"] for record in records]
    assert max(trust[0], trust[2]) < 1e-9 < min(trust[1], trust[3])


def test_the_planned_bytes_are_the_cache_s() -> None:
    trainer = Trainer.from_config(inner())
    assert trainer.components.buffer.reference.nbytes == cache_bytes(
        trainer.config, torch.Size(trainer.components.sample_shape), 2
    )
    assert (
        Trainer.from_config(inner("db")).components.buffer.reference is None
        and cache_bytes(inner("db"), torch.Size((4, 8, 8)), 2) == 0
    )


@pytest.mark.slow
def test_a_target_that_follows_the_reference_has_no_cache(tmp_path: Path) -> None:
    """Its product depends on the flow, so each inner epoch takes the planned passes; resumed between two, the run is the same."""
    config = inner(objective=dataclasses.replace(tiny().objective, reverse_target="reference"))
    trainer = without_pictures(Trainer.from_config(config))
    assert trainer.components.buffer.reference is None
    assert cache_bytes(config, torch.Size((4, 8, 8)), 2) == 0 < cache_bytes(inner(), torch.Size((4, 8, 8)), 2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    trainer.train(whole)
    assert STEPS["residual-db"].cost(config).passes == {"inner": 6, "last": 4}
    for record in records_of(whole):
        assert all(record[f"passes_{kind}"] == passes for kind, passes in (("inner", 6), ("last", 4)))
    stop_after(without_pictures(Trainer.from_config(config)), stopped, 3)
    without_pictures(Trainer.from_config(config)).train(stopped, resume=True)
    assert_same_result(stopped, whole)


def stop_after(trainer: Trainer, folder: Path, updates: int) -> None:
    """Train until a signal comes in update number `updates`."""
    update, stop, calls = trainer.optimizer.update, StopSignals(), []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == updates:
            stop.received = signal.SIGTERM
        return update(*arguments)

    trainer.optimizer.update = stopping
    with pytest.raises(Stopped):
        trainer.train(folder, stop=stop)
    assert (folder / f"checkpoints/update-{updates:06d}").is_dir()


@pytest.mark.slow
def test_resumed_between_inner_epochs(run: Path, tmp_path: Path) -> None:
    stop_after(without_pictures(Trainer.from_config(inner())), tmp_path, 3)
    trainer = without_pictures(Trainer.from_config(inner()))
    trainer.train(tmp_path, resume=True)
    assert_same_result(tmp_path, run)


@pytest.mark.parametrize("method", ["adjoint", "refl", "draft", "draft-lv"])
@pytest.mark.parametrize(("name", "value"), [("epochs", 2), ("replay", 1)])
def test_methods_that_store_nothing_refuse(method: str, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.{name} = {value}: method = '{method}' samples in its step"):
        dataclasses.replace(tiny(), method=method, rollout=RolloutConfig(trajectories=2, fraction=0.5, **{name: value}))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"updates = 6: must be a multiple of rollout\.updates · rollout\.epochs = 4"):
        dataclasses.replace(
            inner(), updates=6, rollout=RolloutConfig(trajectories=2, fraction=0.5, updates=2, epochs=2)
        )
    with pytest.raises(ValueError, match=r"rollout\.epochs = 0: must be at least 1"):
        RolloutConfig(epochs=0)
    with pytest.raises(ValueError, match=r"rollout\.replay = -1: must not be negative"):
        RolloutConfig(replay=-1)
