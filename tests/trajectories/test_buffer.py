"""The trajectory buffer: what comes back from it, what it refuses, and what an update costs."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnabla.distributed.world import ALONE
from fastnabla.methods.accumulation import Accumulation
from fastnabla.trajectories import buffer_ops
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.pooled_buffer import PooledBuffer
from tests.checks import randn

SHAPE = (2, 3, 4)
NUM_STEPS = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Trajectories:
    """Whole trajectories, kept in plain tensors: what a buffer is compared to."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.states = randn(count, NUM_STEPS + 1, *SHAPE, seed=seed)
        self.outputs = randn(count, NUM_STEPS, *SHAPE, seed=seed + 1)

    def append_to(self, buffer: TrajectoryBuffer, slots: Tensor, last: int = NUM_STEPS) -> None:
        for i in range(last):
            buffer.append(slots, i, self.states[:, i], self.outputs[:, i], self.states[:, i + 1])


def poisoned(capacity: int, kept: int, **options) -> TrajectoryBuffer:
    """A buffer whose slabs hold NaN where nothing was stored."""
    buffer = TrajectoryBuffer(capacity, NUM_STEPS, kept, SHAPE, **options)
    for slab in (buffer.x, buffer.model_output):
        slab.fill_(float("nan"))
    return buffer


# Apart, adjacent (which share a state), all steps, and the last step drawn twice.
DRAWS = {
    "apart": [[7, 0, 2, 5], [7, 1, 3, 5]],
    "adjacent": [[7, 6, 5, 4], [7, 0, 1, 2]],
    "repeated": [[7, 0, 7, 3], [7, 4, 5, 7]],
    "all": [[7, 0, 1, 2, 3, 4, 5, 6], [7, 6, 5, 4, 3, 2, 1, 0]],
}


@pytest.mark.parametrize("draws", DRAWS.values(), ids=list(DRAWS))
def test_round_trip(draws):
    """Two calls of `reserve`, trajectories advanced out of step with each other, transitions gathered in any order."""
    steps = torch.tensor(draws)
    kept = steps.shape[1]
    buffer = poisoned(4, kept)
    rollouts = Trajectories(2), Trajectories(2, seed=2)
    slots = [buffer.reserve(s, torch.tensor(p)) for s, p in ((steps, [3, 5]), (steps.flip(0), [4, 5]))]
    assert len(buffer) == 4
    rollouts[1].append_to(buffer, slots[1])
    rollouts[0].append_to(buffer, slots[0])

    states, outputs = (torch.cat([getattr(r, name) for r in rollouts]) for name in ("states", "outputs"))
    all_steps, prompts = torch.cat([steps, steps.flip(0)]), torch.tensor([3, 5, 4, 5])
    index = buffer.transitions()[torch.randperm(4 * kept, generator=generator())]
    batch = buffer.gather(index)
    assert len(batch) == 4 * kept
    trajectory, step = index // kept, all_steps[index // kept, index % kept]
    assert torch.equal(batch.trajectory, trajectory)
    assert torch.equal(batch.step_index, step)
    assert torch.equal(batch.prompt, prompts[trajectory])
    assert torch.equal(batch.x, states[trajectory, step])
    assert torch.equal(batch.x_next, states[trajectory, step + 1])
    assert torch.equal(batch.model_output, outputs[trajectory, step])

    part = batch[torch.tensor([2, 0])]
    assert torch.equal(part.x, batch.x[[2, 0]])
    assert torch.equal(batch[1:3].prompt, batch.prompt[1:3])


@pytest.mark.parametrize("draws", DRAWS.values(), ids=list(DRAWS))
def test_a_state_is_stored_once(draws):
    steps = torch.tensor(draws)
    buffer = poisoned(2, steps.shape[1])
    Trajectories(2).append_to(buffer, buffer.reserve(steps, torch.zeros(2, dtype=torch.int64)))
    for slot, row in enumerate(draws):
        states = {i for step in row for i in (step, step + 1)}
        assert int((~buffer.x[slot].isnan()).flatten(1).all(1).sum()) == len(states)
        assert int((~buffer.model_output[slot].isnan()).flatten(1).all(1).sum()) == len(set(row))
        assert len(buffer.x[slot]) <= NUM_STEPS + 1


def test_transitions_of_some_slots():
    buffer = poisoned(3, 2)
    buffer.reserve(torch.tensor([[7, 0]] * 3), torch.arange(3))
    assert buffer.transitions(torch.tensor([2, 0])).tolist() == [4, 5, 0, 1]


def test_clear():
    buffer = poisoned(2, 2)
    prompt = torch.arange(2)
    Trajectories(2).append_to(buffer, buffer.reserve(torch.tensor([[7, 0], [7, 1]]), prompt))
    buffer.clear()
    assert len(buffer) == 0
    assert buffer.reward.isnan().all()
    rollout = Trajectories(2, seed=4)
    rollout.append_to(buffer, buffer.reserve(torch.tensor([[7, 3], [7, 4]]), prompt))
    assert torch.equal(buffer.gather(buffer.transitions()).x, rollout.states[[0, 0, 1, 1], [7, 3, 7, 4]])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(stored):
    """Stored in one precision, handed out in another; None keeps that of the slabs."""
    buffer = poisoned(1, 2, dtype=stored)
    rollout = Trajectories(1)
    rollout.append_to(buffer, buffer.reserve(torch.tensor([[7, 0]]), torch.zeros(1, dtype=torch.int64)))
    index = buffer.transitions()
    assert buffer.gather(index).x.dtype == stored
    batch = buffer.gather(index, torch.float32)
    for name, expected in (("x", rollout.states[0, [7, 0]]), ("model_output", rollout.outputs[0, [7, 0]])):
        assert getattr(batch, name).dtype == torch.float32
        assert torch.equal(getattr(batch, name), expected.to(stored).float())
    assert batch.step_index.dtype == torch.int64


def test_gather_in_the_slabs_precision_leaves_them_alone():
    buffer = poisoned(1, 2)
    Trajectories(1).append_to(buffer, buffer.reserve(torch.tensor([[7, 0]]), torch.zeros(1, dtype=torch.int64)))
    before = buffer.x.clone()
    batch = buffer.gather(buffer.transitions())
    batch.x.fill_(0)
    torch.testing.assert_close(buffer.x, before, rtol=0, atol=0, equal_nan=True)


def test_full():
    buffer = poisoned(2, 2)
    buffer.reserve(torch.tensor([[7, 0]]), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="the buffer is full: 1 of 2 trajectories reserved, 2 more asked for"):
        buffer.reserve(torch.tensor([[7, 0]] * 2), torch.zeros(2, dtype=torch.int64))
    assert len(buffer) == 1


@pytest.mark.parametrize(
    ("steps", "prompts", "message"),
    [
        ([[7, 8]], 1, r"steps must be in 0\.\.7; found 7\.\.8"),
        ([[7, -1]], 1, r"steps must be in 0\.\.7; found -1\.\.7"),
        ([[7, 0, 1]], 1, r"steps \(1, 3\), prompt \(1,\): expected \[B, 2\] and \[B\]"),
        ([7, 0], 2, r"steps \(2,\), prompt \(2,\)"),
        ([[7, 0]], 2, r"steps \(1, 2\), prompt \(2,\)"),
    ],
    ids=["too_late", "negative", "too_many", "flat", "prompts"],
)
def test_reserve_rejects(steps, prompts, message):
    buffer = poisoned(2, 2)
    with pytest.raises(ValueError, match=message):
        buffer.reserve(torch.tensor(steps), torch.zeros(prompts, dtype=torch.int64))
    assert len(buffer) == 0


def test_append_rejects():
    buffer = poisoned(3, 2)
    slots = buffer.reserve(torch.tensor([[7, 0]] * 2), torch.zeros(2, dtype=torch.int64))
    x = randn(2, *SHAPE)
    with pytest.raises(ValueError, match=r"x_next has shape \(1, 2, 3, 4\), expected \(2, 2, 3, 4\)"):
        buffer.append(slots, 0, x, x, x[:1])
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 2, 3\)"):
        buffer.append(slots, 0, x, x[..., 0], x)
    with pytest.raises(IndexError, match=r"slots must be reserved ones, \[0, 1\]; found \[1, 2\]"):
        buffer.append(slots + 1, 0, x, x, x)
    with pytest.raises(ValueError, match=r"step 1 is out of order: next is \[0, 0\] of 8"):
        buffer.append(slots, 1, x, x, x)
    buffer.append(slots, 0, x, x, x)
    with pytest.raises(ValueError, match=r"step 0 is out of order: next is \[1, 1\] of 8"):
        buffer.append(slots, 0, x, x, x)


def test_append_after_the_last_step():
    buffer = poisoned(1, 2)
    slots = buffer.reserve(torch.tensor([[7, 0]]), torch.zeros(1, dtype=torch.int64))
    Trajectories(1).append_to(buffer, slots)
    x = randn(1, *SHAPE)
    with pytest.raises(ValueError, match=r"step 8 is out of order: next is \[8\] of 8"):
        buffer.append(slots, NUM_STEPS, x, x, x)


@pytest.mark.parametrize("index", [[4], [-1], [0, 7]])
def test_gather_out_of_range(index):
    buffer = poisoned(3, 2)
    Trajectories(2).append_to(buffer, buffer.reserve(torch.tensor([[7, 0]] * 2), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(IndexError, match=r"slots must be reserved ones, \[0, 1\]; found"):
        buffer.gather(torch.tensor(index))


def test_gather_before_the_end():
    buffer = poisoned(2, 2)
    slots = buffer.reserve(torch.tensor([[7, 0]] * 2), torch.zeros(2, dtype=torch.int64))
    Trajectories(2).append_to(buffer, slots, NUM_STEPS - 1)
    with pytest.raises(RuntimeError, match="gather before the rollout is complete"):
        buffer.gather(torch.tensor([1]))


def complete(capacity: int) -> tuple[TrajectoryBuffer, Trajectories]:
    """Full of trajectories of two transitions."""
    buffer, rollout = poisoned(capacity, 2), Trajectories(capacity)
    rollout.append_to(buffer, buffer.reserve(torch.tensor([[7, 0]] * capacity), torch.arange(capacity)))
    return buffer, rollout


class Full(TorchDispatchMode):
    """torch's allocator, without room for a tensor of more than `most` elements."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.__name__.startswith(("empty", "new_empty")) and result.numel() > self.most:
            raise torch.OutOfMemoryError("simulated")
        return result


@pytest.mark.skipif(not buffer_ops.AVAILABLE, reason="the extension is not built")
def test_running_out_of_memory_in_a_gather_halves_the_micro_batch():
    """Results are allocated where a failure is torch's own exception, not inside the extension."""
    buffer, rollout = complete(4)
    step = SimpleNamespace(micro_batch=8, policy=SimpleNamespace(conditions=SimpleNamespace(device=buffer.device)))
    with Full(most=4 * rollout.states[0, 0].numel()):
        assert Accumulation._attempt(step, 8, buffer.gather, torch.arange(8)) is None
        assert step.micro_batch == 4
        batch = Accumulation._attempt(step, 4, buffer.gather, torch.arange(4))
    assert torch.equal(batch.x, rollout.states[[0, 0, 1, 1], [7, 0, 7, 0]])


@pytest.mark.gpu
@pytest.mark.skipif(not buffer_ops.CUDA_AVAILABLE, reason="the extension is not built for CUDA")
def test_running_out_of_the_gpus_memory_in_a_gather():
    buffer = TrajectoryBuffer(1, 1, 1, (2**20,), device="cuda")
    x = torch.ones(1, 2**20, device="cuda")
    buffer.append(buffer.reserve(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)), 0, x, x, x)
    with pytest.raises(torch.OutOfMemoryError):
        buffer.gather(torch.zeros(2**17, dtype=torch.int64))  # of 512 GiB a field
    assert torch.equal(buffer.gather(torch.zeros(3, dtype=torch.int64)).x, x.expand(3, -1))


def test_groups_that_are_split_and_joined():
    """Whichever trajectories are appended to together, the next step of each is known, and checked."""
    buffer, rollout = poisoned(4, 2), Trajectories(4)
    steps = torch.tensor([[7, 0], [7, 1], [7, 2], [7, 3]])
    slots = buffer.reserve(steps, torch.arange(4))

    def append(of: list[int], step: int) -> None:
        parts = rollout.states[of, step], rollout.outputs[of, step], rollout.states[of, step + 1]
        buffer.append(slots[of], step, *parts)

    append([0, 1, 2, 3], 0)
    append([3, 1], 1)
    for of in ([0, 1, 2, 3], [1, 2]):
        with pytest.raises(ValueError, match="step 1 is out of order: next is"):
            append(of, 1)
    with pytest.raises(ValueError, match=r"step 0 is out of order: next is \[1, 1\] of 8"):
        append([0, 2], 0)
    append([2, 0], 1)
    for step in range(2, NUM_STEPS):
        append([0, 1, 2, 3], step)
    with pytest.raises(ValueError, match=r"step 8 is out of order: next is \[8, 8, 8, 8\] of 8"):
        buffer.append(slots, 8, *[rollout.states[:, 0]] * 3)
    expected = rollout.states[torch.arange(4)[:, None], steps].flatten(0, 1)
    assert torch.equal(buffer.gather(buffer.transitions()).x, expected)


def test_a_groups_slots_are_its_own():
    """What the caller does to its tensor of slots after an append has no part in the next."""
    buffer, rollout = poisoned(2, 2), Trajectories(2)
    slots = buffer.reserve(torch.tensor([[7, 0], [7, 1]]), torch.arange(2))
    for i in range(NUM_STEPS):
        given = slots.clone()
        buffer.append(given, i, rollout.states[:, i], rollout.outputs[:, i], rollout.states[:, i + 1])
        given.copy_(given.flip(0))
    assert torch.equal(buffer.gather(buffer.transitions()).x, rollout.states[[0, 0, 1, 1], [7, 0, 7, 1]])


@pytest.mark.parametrize("end", ["clear", "forget", "load"])
def test_a_group_ends_with_its_trajectories(end):
    """Slots that are forgotten, or set back by a saved state, do not go on where their group was."""
    buffer, rollout = poisoned(2, 2), Trajectories(2)
    drawn = torch.tensor([[7, 0]] * 2), torch.arange(2)
    slots = buffer.reserve(*drawn)
    rollout.append_to(buffer, slots, last=1)
    state = buffer.state_dict()
    buffer.append(slots, 1, rollout.states[:, 1], rollout.outputs[:, 1], rollout.states[:, 2])
    if end == "load":
        buffer.load_state_dict(state)
    else:
        buffer.clear() if end == "clear" else buffer.forget(2)
        with pytest.raises(IndexError, match="slots must be reserved ones"):
            buffer.append(slots, 2, rollout.states[:, 2], rollout.outputs[:, 2], rollout.states[:, 3])
        slots = buffer.reserve(*drawn)
    first = 1 if end == "load" else 0
    with pytest.raises(ValueError, match=rf"step 2 is out of order: next is \[{first}, {first}\]"):
        buffer.append(slots, 2, rollout.states[:, 2], rollout.outputs[:, 2], rollout.states[:, 3])
    for i in range(first, NUM_STEPS):
        buffer.append(slots, i, rollout.states[:, i], rollout.outputs[:, i], rollout.states[:, i + 1])
    assert torch.equal(buffer.gather(buffer.transitions()).x, rollout.states[[0, 0, 1, 1], [7, 0, 7, 0]])


@pytest.mark.skipif(not buffer_ops.AVAILABLE, reason="the extension is not built")
def test_an_update_is_one_call_of_the_operation(monkeypatch):
    """All transitions of a selection, which may then be sliced: the same as gathered in parts."""
    buffer, calls = complete(4)[0], []
    gather = buffer_ops.gather
    monkeypatch.setattr(buffer_ops, "gather", lambda *arguments: calls.append(0) or gather(*arguments))
    selection, order = buffer.select(), torch.randperm(8, generator=generator())
    whole = selection.gather(order)
    assert len(calls) == 1
    for part in torch.arange(8).split(3):
        parts, sliced = selection.gather(order[part]), whole[part]
        for name in buffer_ops.FIELDS:
            torch.testing.assert_close(getattr(sliced, name), getattr(parts, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity = 0: must be at least 1"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"kept": 0}, "kept = 0"),
        ({"sample_shape": ()}, r"sample_shape = \(\)"),
        ({"sample_shape": (4, 0)}, r"sample_shape = \(4, 0\)"),
        ({"output_block": 100}, "output_block = 100: expected 64, 128 or 256"),
        ({"storage": "disk"}, "storage = 'disk': expected one of"),
        ({"storage": "prefetch"}, r"storage = 'prefetch': expected one of \('device', 'pinned'\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryBuffer(**({"capacity": 2, "num_steps": 8, "kept": 2, "sample_shape": SHAPE} | arguments))


def test_refused_calls_change_nothing():
    buffer = TrajectoryBuffer(3, NUM_STEPS, 2, SHAPE)
    slots = buffer.reserve(torch.tensor([[7, 0]] * 2), torch.zeros(2, dtype=torch.int64))
    Trajectories(2).append_to(buffer, slots)
    before = buffer.state_dict()
    incomplete = {name: value for name, value in before.items() if name != "_appended"}
    x = randn(2, *SHAPE)
    for refused, message in (
        (lambda: buffer.reserve(torch.tensor([[7, 0]]).int(), slots[:1]), "steps has dtype torch.int32"),
        (lambda: buffer.reserve(torch.tensor([[7, 0]]), slots[:1].float()), "prompt has dtype torch.float32"),
        (lambda: buffer.load_state_dict(incomplete), "the state lacks _appended"),
        (lambda: buffer.append(slots * 0, 0, x, x, x), r"slots must be different, found \[0, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
        after = buffer.state_dict()
        assert all(
            torch.equal(after[name].nan_to_num(), value.nan_to_num())
            if isinstance(value, torch.Tensor)
            else after[name] == value
            for name, value in before.items()
        )


OLD_KEYS = {"epoch": torch.zeros(4, dtype=torch.int64), "timestep": torch.arange(NUM_STEPS)}
"""What the state of a buffer of four trajectories also had in earlier versions."""


def test_states_of_earlier_versions():
    """Whole or pooled over ranks: keys that are no longer used are ignored."""
    buffer, rollout = complete(4)
    state = buffer.state_dict() | OLD_KEYS
    whole, part, slots = poisoned(4, 2), poisoned(2, 2), torch.tensor([1, 3])
    whole.load_state_dict(state)
    assert torch.equal(whole.gather(whole.transitions()).x, buffer.gather(buffer.transitions()).x)
    PooledBuffer(part, ALONE, slots, 4).load_state_dict(state)
    assert torch.equal(part.gather(part.transitions()).x, rollout.states[[1, 1, 3, 3], [7, 0, 7, 0]])
    assert whole.state_dict().keys() == part.state_dict().keys() == state.keys() - OLD_KEYS.keys()


def test_an_incomplete_pooled_state_is_refused():
    buffer, part = complete(4)[0], poisoned(2, 2)
    state = {name: value for name, value in buffer.state_dict().items() if name != "reward"}
    with pytest.raises(ValueError, match="the state lacks reward"):
        PooledBuffer(part, ALONE, torch.tensor([1, 3]), 4).load_state_dict(state)
    assert len(part) == 0
