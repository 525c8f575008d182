"""The trajectory buffer: storing a rollout and gathering its transitions, compared with other ways to do it.

The settings are the paper's: latents 4 × 64 × 64, and 50 steps of which 6 are trained on, including the last. Batches have 16
trajectories. There are 64 trajectories on CUDA and 16 on a CPU. Rollouts and gathered transitions are float32. All
providers gather the same transitions in the same random order, and are checked to be equal before anything is timed.

- reference's pattern: the authors' code. It keeps all states, next states and outputs in lists, stacks and concatenates
  them, shuffles them by trajectory, permutes them along time with index tensors of T + 1 columns, and slices. In its
  favour, the making of these indices is not timed and the scores that the authors carry along are left out. Against it,
  all slices are copied; in their code those of next states and outputs are views, and states may be bfloat16.
- index_select: slabs of the drawn transitions, with one `index_copy_` or `index_select` a field and batch.
- tensordict: the same slabs in a TensorDict, if that is installed.
- fastnabla: our buffer, `reserve` included. Variants: outputs in 8 bits, slabs in bfloat16, pinned slabs (on CUDA), and
  all transitions gathered at once, as a whole update.

A call stores a whole rollout or gathers all its drawn transitions, with cold caches. Bytes count states, outputs and scales:
what the other providers' copies read and write, and what fastnabla must, each kept or gathered row in and out once.
"""

import collections
import functools
import itertools
import timeit
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bench import measure
from fastnabla.trajectories import buffer_ops, buffer_torch
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.transitions import Transitions

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
TRAJECTORIES, BATCH, STEPS, KEPT, SHAPE = 64 if CUDA else 16, 16, 50, 6, (4, 64, 64)
BATCHES = [slice(first, first + BATCH) for first in range(0, TRAJECTORIES, BATCH)]
LARGE = ("x", "x_next", "model_output")
LAYER = 4 * TRAJECTORIES * torch.Size(SHAPE).numel()  # bytes of a float32 state of every trajectory
drain = functools.partial(collections.deque, maxlen=0)  # go through an iterator, keeping nothing


@functools.cache
def rollout() -> SimpleNamespace:
    """A random rollout.

    On the device: states `[T + 1, B, …]`, outputs `[T, B, …]` and reward `[B]`; columns `[B, T + 1]`, the authors' order of
    steps (the last, then draws from strata); order `[B]`, the shuffled trajectories; numbers `[B * KEPT]`, the other
    fields of a transition. On the CPU: steps `[B, KEPT]`, the first columns; parts, the batches of transition numbers
    (trajectory * KEPT + column).
    """
    generator, strata = torch.Generator().manual_seed(0), KEPT - 1
    states, outputs = (torch.empty(n, TRAJECTORIES, *SHAPE, device=DEVICE).normal_() for n in (STEPS + 1, STEPS))
    within = torch.randint(STEPS // strata, (TRAJECTORIES, STEPS), generator=generator)
    drawn = within + STEPS // strata * (torch.arange(STEPS) % strata)
    columns = torch.cat([torch.full((TRAJECTORIES, 1), STEPS - 1), drawn], 1)
    order, reward = torch.randperm(TRAJECTORIES, generator=generator), torch.randn(TRAJECTORIES, generator=generator)
    steps, own = columns[:, :KEPT], torch.arange(TRAJECTORIES).repeat_interleave(KEPT)
    numbers = dict.fromkeys(("step_index", "prompt", "trajectory"), steps.flatten())
    return SimpleNamespace(
        **{"states": states, "outputs": outputs, "steps": steps},
        **{"columns": columns.to(DEVICE), "order": order.to(DEVICE), "reward": reward.to(DEVICE)},
        parts=[trajectory * KEPT + column for trajectory in order.split(BATCH) for column in range(KEPT)],
        numbers={name: values.to(DEVICE) for name, values in {**numbers, "reward": reward[own]}.items()},
    )


class Reference:
    moved: ClassVar = {"append": 2 * (5 * STEPS + 1) * LAYER, "gather": 2 * 3 * (2 * STEPS + 1 + KEPT) * LAYER}
    stored = 3 * STEPS * LAYER  # bytes; also what is moved, by operation

    def append(self) -> None:
        r, samples, steps = rollout(), [], torch.arange(STEPS, device=DEVICE).expand(BATCH, -1)
        for batch in BATCHES:
            x = torch.stack([state[batch] for state in r.states], 1)
            output = torch.stack([output[batch] for output in r.outputs], 1)
            large = dict(zip(LARGE, (x[:, :-1], x[:, 1:], output), strict=True))
            samples.append({**large, "step_index": steps, "reward": r.reward[batch]})
        self.fields = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}

    def gather(self, parts: list[Tensor]) -> Iterator[dict[str, Tensor]]:
        order, rows = rollout().order, torch.arange(TRAJECTORIES, device=DEVICE)[:, None]
        fields, columns = {name: field[order] for name, field in self.fields.items()}, rollout().columns[order]
        for name in fields.keys() - {"reward"}:
            fields[name] = fields[name][rows, columns]
        for batch, column in itertools.product(BATCHES, range(KEPT)):
            yield {k: v[batch] if k == "reward" else v[batch, column].contiguous() for k, v in fields.items()}


class IndexSelect:
    moved: ClassVar = {"append": 2 * 2 * 3 * KEPT * LAYER, "gather": 2 * 3 * KEPT * LAYER}
    stored = 3 * KEPT * LAYER

    def __init__(self, make=None) -> None:  # make: the class TensorDict
        large = {name: torch.empty(KEPT * TRAJECTORIES, *SHAPE, device=DEVICE) for name in LARGE}
        slabs, self.make = large | rollout().numbers, make
        self.slabs = make(slabs, batch_size=[KEPT * TRAJECTORIES]) if make else slabs

    def append(self) -> None:
        r = rollout()
        for batch, step in ((part, step) for part in BATCHES for step in r.steps[part].unique().tolist()):
            rows, column = (r.steps[batch] == step).nonzero(as_tuple=True)
            at, rows = ((batch.start + rows) * KEPT + column).to(DEVICE), rows.to(DEVICE)
            sources = zip(LARGE, (r.states[step], r.states[step + 1], r.outputs[step]), strict=True)
            values = {name: source[batch].index_select(0, rows) for name, source in sources}
            if self.make:
                self.slabs.select(*LARGE)[at] = self.make(values, batch_size=[len(at)])
            for name in () if self.make else LARGE:
                self.slabs[name].index_copy_(0, at, values[name])

    def gather(self, parts: list[Tensor]) -> Iterator[Any]:
        for index in (part.to(DEVICE) for part in parts):
            yield self.slabs[index] if self.make else {k: v.index_select(0, index) for k, v in self.slabs.items()}


class Ours:
    def __init__(self, dtype=torch.float32, block: int | None = None, storage="device") -> None:
        sizes, r = (TRAJECTORIES, STEPS, KEPT, SHAPE, dtype, DEVICE), rollout()
        self.buffer = b = TrajectoryBuffer(*sizes, storage=storage, output_block=block)
        row, state, output = (values[0, 0].nbytes for values in (r.states, b.x, b.model_output))
        output += b.scales[0, 0].nbytes if block else 0
        states = sum(len({*steps, *(step + 1 for step in steps)}) for steps in r.steps.tolist())
        append = states * (row + state) + sum(len({*steps}) for steps in r.steps.tolist()) * (row + output)
        self.read, self.stored = KEPT * TRAJECTORIES * (2 * state + output), b.nbytes
        self.moved = {"append": append, "gather": self.read + 3 * KEPT * LAYER}

    def append(self) -> None:
        r = rollout()
        self.buffer.clear()
        for batch in BATCHES:
            slots = self.buffer.reserve(r.steps[batch], torch.arange(batch.start, batch.stop))
            for t in range(STEPS):
                self.buffer.append(slots, t, r.states[t, batch], r.outputs[t, batch], r.states[t + 1, batch])
        self.buffer.reward.copy_(r.reward)

    def gather(self, parts: list[Tensor]) -> Iterator[Transitions]:
        return (self.buffer.gather(part, torch.float32) for part in parts)

    def device_append(self) -> None:
        """The operation alone, into the slots of the last stored rollout, given on the device."""
        r, slabs = rollout(), self.buffer._slabs()
        for batch, slots in zip(BATCHES, torch.arange(TRAJECTORIES, device=DEVICE).split(BATCH), strict=True):
            for t in range(STEPS):
                x, output, x_next = (r.states[t, batch], r.outputs[t, batch], r.states[t + 1, batch])
                buffer_ops.append(*slabs, slots, t, x, output, x_next)

    def device_gather(self, parts: list[Tensor]) -> Iterator[Any]:
        b = self.buffer
        tensors = (*b._slabs(), b.steps, b.prompt, b.reward)
        return (buffer_ops.gather(*tensors, part, torch.float32) for part in parts)


class OursAtOnce(Ours):
    def gather(self, parts: list[Tensor]) -> Iterator[Transitions]:
        whole = self.buffer.gather(torch.cat(parts), torch.float32)
        return (whole[batch] for batch in map(slice, range(0, len(whole), BATCH), range(BATCH, len(whole) + 1, BATCH)))

    def device_gather(self, parts: list[Tensor]) -> Iterator[Any]:
        return super().device_gather([torch.cat(parts)])


PROVIDERS = {
    "reference's pattern": Reference,
    "index_select": IndexSelect,
    "tensordict": lambda: IndexSelect(pytest.importorskip("tensordict").TensorDict),
    "fastnabla": Ours,
    "fastnabla, at once": OursAtOnce,
    "fastnabla, 8-bit outputs": lambda: Ours(block=128),
    "fastnabla, bfloat16": lambda: Ours(torch.bfloat16),
    **({"fastnabla, pinned": lambda: Ours(storage="pinned")} if CUDA else {}),
}


@functools.lru_cache(maxsize=1)
def filled(name: str) -> Any:
    """A provider that holds the rollout, checked to gather it again, rounded as it is stored."""
    r, provider = rollout(), PROVIDERS[name]()
    provider.append()
    for part, batch in zip(r.parts, provider.gather(r.parts), strict=True):
        row, step = (part // KEPT).to(DEVICE), r.steps.flatten()[part].to(DEVICE)
        values = [r.states[step, row], r.states[step + 1, row], r.outputs[step, row]]
        if "8-bit" in name:
            coded = buffer_torch.quantise(values[2].flatten(1), 128)
            values[2] = buffer_torch.dequantise(*coded, 128, torch.float32).view_as(values[0])
        if "bfloat16" in name:
            values = [value.bfloat16().float() for value in values]
        for field, value in zip((*LARGE, "step_index", "reward"), (*values, step, r.reward[row]), strict=True):
            given = getattr(batch, field) if isinstance(batch, Transitions) else batch[field]
            assert torch.equal(given, value), f"{name}: {field} is not that of the rollout"
    return provider


CASES = [
    case for case in itertools.product(PROVIDERS, ("append", "gather")) if case != ("fastnabla, at once", "append")
]
FIRST = ("fastnabla", "fastnabla, at once", "fastnabla, pinned", "index_select")
"""Timed first, since time may be short."""
CASES.sort(key=lambda case: FIRST.index(case[0]) if case[0] in FIRST else len(FIRST))


@pytest.mark.parametrize(("name", "operation"), CASES)
def bench_buffer(benchmark, name: str, operation: str) -> None:
    with measure.own_stream():  # on CUDA; it can be captured
        provider, parts, memory = filled(name), rollout().parts, torch.ones(2**25, device=DEVICE)
        run = provider.append if operation == "append" else lambda: drain(provider.gather(parts))
        flush = measure.synchronised(lambda: drain([memory.sum()]))
        benchmark.group = f"{operation}, {TRAJECTORIES} trajectories of SD 1.5, {'CUDA' if CUDA else 'CPU'}"
        rounds = max(5, min(25, round(2 / timeit.timeit(measure.synchronised(run), number=2))))  # about 1 s
        benchmark.pedantic(measure.synchronised(run), setup=flush, rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        stats = benchmark.stats.stats
        info, seconds = {"buffer": name, "operation": operation, "fastest s": stats.min, "graph us": None}, stats.median
        if CUDA and operation == "append" and isinstance(provider, Ours):
            info["graph us"] = measure.time_graph(provider.device_append)
            seconds = info["graph us"] / 1e6
        if CUDA and operation == "gather":
            # The operation alone, with indices on the device; the buffer checks them on the host.
            gather, index = getattr(provider, "device_gather", provider.gather), [part.to(DEVICE) for part in parts]
            info["graph us"] = measure.time_graph(lambda: drain(gather(index)))
            seconds = info["graph us"] / 1e6
            if "pinned" in name:
                host, rate = torch.ones(memory.shape).pin_memory(), provider.read / seconds / 1e9
                copying = measure.time_cuda(lambda: memory.copy_(host, non_blocking=True))
                info |= {"read GB/s": rate, "host to device GB/s": host.nbytes / copying / 1e3}
        rate, copy = provider.moved[operation] / seconds / 1e9, measure.copy_bandwidth(DEVICE)
        info |= {"bytes": provider.moved[operation], "GB/s": rate, "copy GB/s": copy, "share of copy": rate / copy}
        info |= {"bytes a trajectory": provider.stored // TRAJECTORIES, "launches": measure.launches(run)}
        info |= {"of reference": provider.stored / Reference.stored, "threads": torch.get_num_threads()}
        info["row"] = f"{name}, {operation}"
        info["extension used"] = buffer_ops.CUDA_AVAILABLE if CUDA else buffer_ops.AVAILABLE
        benchmark.extra_info |= {**info, "device": measure.device_info()}
