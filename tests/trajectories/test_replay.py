"""A buffer that is used as a ring: against a list of whole trajectories, in threads, and wherever it is stored."""

import dataclasses
import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.transitions import Transitions
from tests.checks import append_all, randn

ROW, NUM_STEPS = (3, 25), 4
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
MOSTLY = st.sampled_from([True, True, True, False])
FIELDS = [field.name for field in dataclasses.fields(Transitions)]
NUMBERS = ("step_index", "prompt", "trajectory")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass
class Trajectory:
    """One of the model's: all of it, and what the buffer was told."""

    slot: int
    steps: list[int]
    prompt: int
    seed: int
    appended: int = 0
    reward: float = float("nan")

    def __post_init__(self) -> None:
        self.states = randn(NUM_STEPS + 1, *ROW, seed=self.seed)
        self.outputs = randn(NUM_STEPS, *ROW, seed=self.seed + 1)

    @property
    def complete(self) -> bool:
        return self.appended == NUM_STEPS


class Ring(RuleBasedStateMachine):
    """Any sequence of calls, legal or not, and a list of trajectories, oldest first, that says what must come of it."""

    @initialize(
        capacity=st.integers(1, 5),
        kept=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        block=st.sampled_from([None, 64]),
    )
    def begin(self, capacity, kept, dtype, block):
        self.arguments = (capacity, NUM_STEPS, kept, ROW, dtype)
        self.options = {"output_block": block}
        self.buffer = TrajectoryBuffer(*self.arguments, **self.options)
        self.live: list[Trajectory] = []
        self.next_slot = self.made = 0

    def refused(self, error: type[Exception], message: str, call) -> None:
        """The call raises, and the buffer's state is bit by bit what it was."""
        before = self.buffer.state_dict()
        with pytest.raises(error, match=message):
            call()
        assert_same_state(self.buffer.state_dict(), before)

    @rule(count=st.integers(0, 6), seed=st.integers(0, 99))
    def reserve(self, count, seed):
        capacity, _, kept = self.arguments[:3]
        count %= capacity + 2
        steps = torch.randint(NUM_STEPS, (count, kept), generator=generator(seed))
        prompt = torch.arange(count) + seed
        if len(self.live) + count > capacity:
            return self.refused(RuntimeError, "the buffer is full", lambda: self.buffer.reserve(steps, prompt))
        slots = [(self.next_slot + i) % capacity for i in range(count)]
        assert self.buffer.reserve(steps, prompt).tolist() == slots
        for slot, row, number in zip(slots, steps.tolist(), prompt.tolist(), strict=True):
            self.made += 1
            self.live.append(Trajectory(slot, row, number, seed=10 * self.made))
        self.next_slot = (self.next_slot + count) % capacity

    @rule(legal=MOSTLY, choice=st.integers(0, 99))
    def append(self, legal, choice):
        """The next step of all trajectories that are as far as one of them; or another step."""
        if not self.live:
            return
        far = self.live[choice % len(self.live)].appended
        chosen = [t for t in self.live if t.appended == far][:: 1 if choice % 2 else -1]
        step = far if legal else choice % (NUM_STEPS + 1)
        at = min(step, NUM_STEPS - 1)
        slots = torch.tensor([t.slot for t in chosen])
        x, output, x_next = (
            torch.stack([getattr(t, name)[i] for t in chosen])
            for name, i in (("states", at), ("outputs", at), ("states", at + 1))
        )
        if step != far or far == NUM_STEPS:
            self.refused(ValueError, "out of order", lambda: self.buffer.append(slots, step, x, output, x_next))
        else:
            self.refused(ValueError, "x_next", lambda: self.buffer.append(slots, step, x, output, x_next[:, :1]))
            self.buffer.append(slots, step, x, output, x_next)
            for trajectory in chosen:
                trajectory.appended += 1

    @rule(reward=st.floats(-10, 10, width=32), choice=st.integers(0, 99))
    def set_reward(self, reward, choice):
        if self.live:
            trajectory = self.live[choice % len(self.live)]
            self.buffer.reward[trajectory.slot] = trajectory.reward = reward

    @rule()
    def finish(self):
        """All remaining steps of all trajectories."""
        for t in self.live:
            slot, states, outputs = torch.tensor([t.slot]), t.states[None], t.outputs[None]
            for i in range(t.appended, NUM_STEPS):
                self.buffer.append(slot, i, states[:, i], outputs[:, i], states[:, i + 1])
            t.appended = NUM_STEPS

    @rule(count=st.integers(0, 6), newest=st.booleans())
    def forget(self, count, newest):
        """The oldest, after which the ring goes on; or the newest, whose slots are used next."""
        if count > len(self.live):
            return self.refused(ValueError, f"count = {count}: must be", lambda: self.buffer.forget(count, newest))
        self.buffer.forget(count, newest)
        kept = len(self.live) - count
        self.live = self.live[:kept] if newest else self.live[count:]
        if newest:
            self.next_slot = (self.next_slot - count) % self.arguments[0]

    @rule(count=st.integers(1, 5), seed=st.integers(0, 99))
    def replay(self, count, seed):
        """What training does: all complete, old ones out, new ones in, some read."""
        self.finish()
        count = min(count, self.arguments[0])
        self.forget(max(len(self.live) + count - self.arguments[0], 0), newest=False)
        self.reserve(count, seed)
        self.finish()
        self.gather(True, seed, None)

    @rule(refrain=MOSTLY)
    def clear(self, refrain):
        if not refrain:
            self.buffer.clear()
            self.live, self.next_slot = [], 0

    @rule()
    def restore(self):
        """Into another buffer, which goes on from there; not into one of another geometry."""
        state, (capacity, num_steps, *rest) = self.buffer.state_dict(), self.arguments
        before, self.buffer = self.buffer, TrajectoryBuffer(capacity + 1, num_steps, *rest, **self.options)
        self.refused(
            ValueError, f"capacity {capacity}, .*; this buffer has", lambda: self.buffer.load_state_dict(state)
        )
        self.buffer = TrajectoryBuffer(*self.arguments, **self.options)
        self.buffer.load_state_dict(state)
        before.x.zero_()  # the state is a copy
        assert_same_state(self.buffer.state_dict(), state)

    @rule(legal=MOSTLY, seed=st.integers(0, 99), dtype=st.sampled_from([None, torch.float32, torch.bfloat16]))
    def gather(self, legal, seed, dtype):
        """Some transitions, with repetitions: of complete trajectories, or of any slots."""
        capacity, _, kept = self.arguments[:3]
        slots = torch.tensor([t.slot for t in self.live if t.complete] if legal else range(capacity), dtype=torch.int64)
        numbers = self.buffer.transitions(slots)
        index = numbers[torch.randint(len(numbers), (seed % 12,), generator=generator(seed))] if len(slots) else numbers
        by_slot = {t.slot: t for t in self.live}
        chosen = [(by_slot.get(i // kept), i % kept) for i in index.tolist()]
        if any(t is None for t, _ in chosen):
            self.refused(IndexError, "slots must be reserved ones", lambda: self.buffer.gather(index, dtype))
        elif not all(t.complete for t, _ in chosen):
            self.refused(RuntimeError, "before the rollout is complete", lambda: self.buffer.gather(index, dtype))
        else:
            self.compare(self.buffer.gather(index, dtype), [(t, t.steps[i]) for t, i in chosen], dtype)

    def compare(self, batch: Transitions, expected: list[tuple[Trajectory, int]], dtype) -> None:
        """States exactly; outputs too, or in 8 bits within half of 1/127 of the largest, plus the rounding to `dtype`."""
        stored = self.arguments[-1]
        assert len(batch) == len(expected)
        for i, (t, step) in enumerate(expected):
            for name, value in (("x", t.states[step]), ("x_next", t.states[step + 1])):
                assert torch.equal(getattr(batch, name)[i], value.to(stored).to(dtype or stored))
            output, value = batch.model_output[i], t.outputs[step]
            if self.options["output_block"] is None:
                assert torch.equal(output, value.to(stored).to(dtype or stored))
            else:
                blocks = value.flatten().split(64), output.float().flatten().split(64)
                for exact, actual in zip(*blocks, strict=True):
                    largest = exact.abs().max()
                    rounding = torch.finfo(output.dtype).eps / 2 + 1e-6
                    assert ((exact - actual).abs() <= largest / 254 + rounding * largest).all()
            numbers = [int(getattr(batch, name)[i]) for name in NUMBERS]
            assert numbers == [step, t.prompt, t.slot]
            assert batch.reward[i].item() == t.reward or (batch.reward[i].isnan() and t.reward != t.reward)
        assert batch.x.dtype == batch.model_output.dtype == (dtype or stored)

    @invariant()
    def what_is_there(self):
        assert len(self.buffer) == len(self.live)
        assert self.buffer.slots().tolist() == [t.slot for t in self.live]


def assert_same_state(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(actual[name].view(torch.uint8), value.view(torch.uint8)), name
        else:
            assert actual[name] == value, name


TestRing = pytest.mark.slow(Ring.TestCase)
TestRing.settings = settings(max_examples=100, stateful_step_count=50)


def filled(count: int, capacity: int, **options) -> tuple[TrajectoryBuffer, list[Trajectory]]:
    """A buffer of complete trajectories. If there are more than fit, the oldest have left it."""
    buffer = TrajectoryBuffer(capacity, NUM_STEPS, 2, ROW, **options)
    return buffer, [add(buffer, number) for number in range(count)][-capacity:]


def add(buffer: TrajectoryBuffer, number: int) -> Trajectory:
    steps = torch.randint(NUM_STEPS, (1, 2), generator=generator(number))
    if len(buffer) == buffer.capacity:
        buffer.forget(1)
    slots = buffer.reserve(steps, torch.tensor([number]))
    trajectory = Trajectory(int(slots), steps[0].tolist(), number, 10 * number, NUM_STEPS)
    append_all(buffer, slots, *(tensor.to(buffer.device)[None] for tensor in (trajectory.states, trajectory.outputs)))
    return trajectory


def assert_holds(batch: Transitions, trajectories: list[Trajectory]) -> None:
    """Both transitions of each, one after the other, exactly."""
    expected = [(t, step) for t in trajectories for step in t.steps]
    for name, source, later in (("x", "states", 0), ("x_next", "states", 1), ("model_output", "outputs", 0)):
        rows = torch.stack([getattr(t, source)[step + later] for t, step in expected])
        assert torch.equal(getattr(batch, name).cpu(), rows)
    assert batch.prompt.tolist() == [t.prompt for t, _ in expected]


@pytest.mark.parametrize("storage", ["device", "pinned"])
@DEVICES
def test_storage(device, storage):
    """Wherever the slabs are, `gather` gives the same, whole or in parts; also after more was written."""
    buffer, live = filled(7, capacity=5, device=device, storage=storage)
    assert buffer.x.device.type == ("cpu" if storage != "device" else device)
    for last in (7, 8):
        index = buffer.transitions()
        assert_holds(buffer.gather(index), live)
        for size in (1, 3, 10):
            parts = [buffer.gather(part) for part in index.split(size)]
            joined = Transitions(**{name: torch.cat([getattr(part, name) for part in parts]) for name in FIELDS})
            assert_holds(joined, live)
            assert all(getattr(joined, name).device.type == device for name in FIELDS)
        live = [*live[1:], add(buffer, last)]


@pytest.mark.parametrize("block", [None, 64])
def test_append_and_gather_in_different_threads(block):
    """One thread writes new trajectories while another reads complete ones, exactly; then both are there."""
    buffer, live = filled(4, capacity=44, output_block=block)
    index = buffer.transitions()
    expected, rounds, added = buffer.gather(index), 0, []
    writer = threading.Thread(target=lambda: added.extend(add(buffer, number) for number in range(4, 44)))
    writer.start()
    while writer.is_alive() or not rounds:
        rounds += 1
        batch = buffer.gather(index)
        for name in (*NUMBERS, "x", "x_next", "model_output"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    writer.join()
    assert len(buffer) == 4 + len(added) == 44
    if block is None:
        assert_holds(buffer.gather(buffer.transitions()), [*live, *added])
