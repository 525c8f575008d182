"""The buffer's operations in torch and NumPy: their specification, and what runs where the extension is missing.

Same names, arguments and numbers as in `fastnabla.trajectories.buffer_ops`; draws and quantised values agree bit for bit. Slabs may
be on another device than the rest.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastnabla.utils.seeding import philox


def append(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    slots: Tensor,
    step: int,
    x: Tensor,
    output: Tensor,
    x_next: Tensor,
) -> None:
    _check_slots(states, outputs, state_at, output_at, slots)
    if not 0 <= step < output_at.shape[1]:
        raise RuntimeError(f"step: expected one in 0 ... {output_at.shape[1] - 1}, given {step}")
    _write(states, None, slots, state_at[slots, step], x)
    _write(outputs, scales, slots, output_at[slots, step], output)
    _write(states, None, slots, state_at[slots, step + 1], x_next)


def append_steps(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    slots: Tensor,
    x: Tensor,
    output: Tensor,
) -> None:
    _check_slots(states, outputs, state_at, output_at, slots)
    for slab, its_scales, table, values in ((states, None, state_at, x), (outputs, scales, output_at, output)):
        count = table.shape[1]
        _write(slab, its_scales, slots.repeat_interleave(count), table[slots].flatten(), values.flatten(0, 1))


def gather(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    steps: Tensor,
    prompt: Tensor,
    reward: Tensor,
    epoch: Tensor,
    timestep: Tensor,
    index: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = steps.shape[1]
    _check_range("index", index, 0, len(states) * kept)
    slots = index // kept
    step = steps[slots, index % kept]
    _check_range("steps", step, 0, len(timestep))
    here, there, result = state_at[slots, step], state_at[slots, step + 1], output_at[slots, step]
    for name, positions, slab in (
        ("state_at", here, states),
        ("state_at", there, states),
        ("output_at", result, outputs),
    ):
        _check_range(name, positions, 0, slab.shape[1])
    return (
        _read(states, None, slots, here, dtype),
        _read(states, None, slots, there, dtype),
        _read(outputs, scales, slots, result, dtype),
        step,
        timestep[step],
        prompt[slots],
        slots,
        reward[slots],
        epoch[slots],
    )


def quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    rows, elements = x.shape
    blocks = -(-elements // block)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * block - elements)).view(rows, blocks, block)
    absmax = padded.abs().amax(2)
    # By a tensor: CUDA multiplies by the reciprocal of a number.
    scales = absmax / torch.full_like(absmax, 127)
    scale = scales[:, :, None]
    ratio = torch.where(scale.isfinite() & (scale > 0), padded / scale, 0)
    q = ratio.round().clamp(-127, 127).to(torch.int8)
    return q.view(rows, blocks * block)[:, :elements].contiguous(), scales


def dequantise(q: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    return (q.float() * scales.repeat_interleave(block, 1)[:, : q.shape[1]]).to(dtype)


def draw_stratified(seed: int, first: int, trajectories: int, num_steps: int, strata: int) -> Tensor:
    width = num_steps // strata
    steps = [_bounded(width, seed, d, first, trajectories) + d * width for d in range(strata)]
    return _with_last(steps, trajectories, num_steps)


def draw_uniform(seed: int, first: int, trajectories: int, num_steps: int, draws: int) -> Tensor:
    order = np.tile(np.arange(num_steps - 1), (trajectories, 1))
    rows = np.arange(trajectories)
    for d in range(draws):
        other = d + _bounded(num_steps - 1 - d, seed, d, first, trajectories)
        order[rows, other], order[rows, d] = order[rows, d], order[rows, other]
    return _with_last(list(order.T[:draws]), trajectories, num_steps)


def _with_last(steps: list[np.ndarray], trajectories: int, num_steps: int) -> Tensor:
    return torch.from_numpy(np.stack([np.full(trajectories, num_steps - 1), *steps], 1))


_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _bounded(bound: int, seed: int, draw: int, first: int, trajectories: int) -> np.ndarray:
    """A number below `bound` for each trajectory, as `bounded` in csrc/philox.h."""
    trajectory = np.arange(first, first + trajectories).astype(np.uint64)
    key = np.uint64(seed % 2**64)
    numbers = np.zeros(trajectories, np.int64)
    pending = np.arange(trajectories)
    attempt = 0
    while len(pending):
        low, high = trajectory[pending] & _LOW, trajectory[pending] >> _HALF
        word = philox((np.uint64(draw), np.uint64(attempt), low, high), (key & _LOW, key >> _HALF))[0]
        product = word * np.uint64(bound)
        accepted = (product & _LOW) >= np.uint64(2**32 % bound)
        numbers[pending[accepted]] = product[accepted] >> _HALF
        pending = pending[~accepted]
        attempt += 1
    return numbers


def _block_of(elements: int, blocks: int) -> int:
    """The power of two of which `blocks` cover `elements`; there is at most one, but for a single block."""
    for block in (1 << power for power in range(32)):
        if -(-elements // block) == blocks:
            return block
    raise RuntimeError(f"scales: expected one for every block of 2^k elements of a row of {elements}, given {blocks}")


def _write(slab: Tensor, scales: Tensor | None, slots: Tensor, positions: Tensor, values: Tensor) -> None:
    """Rows of `values` to `slab[slot, position]` where the position is not negative."""
    kept = positions >= 0
    where = slots[kept].to(slab.device), positions[kept].long().to(slab.device)
    values = values[kept]
    if scales is None:
        slab[where] = values.to(slab)
    else:
        q, its_scales = quantise(values.flatten(1), _block_of(math.prod(slab.shape[2:]), scales.shape[2]))
        slab[where], scales[where] = q.view(values.shape).to(slab), its_scales.to(scales)


def _read(slab: Tensor, scales: Tensor | None, slots: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    where = slots.to(slab.device), positions.long().to(slab.device)
    rows = slab[where]
    if scales is not None:
        block = _block_of(math.prod(slab.shape[2:]), scales.shape[2])
        rows = dequantise(rows.flatten(1), scales[where], block, dtype).view(rows.shape)
    return rows.to(slots.device, dtype)


def _check_slots(states: Tensor, outputs: Tensor, state_at: Tensor, output_at: Tensor, slots: Tensor) -> None:
    _check_range("slots", slots, 0, len(states))
    if slots.device.type == "cpu" and len(slots.unique()) < len(slots):
        raise RuntimeError(f"slots: expected each slot once, given {slots.tolist()}")
    _check_range("state_at", state_at[slots], -1, states.shape[1])
    _check_range("output_at", output_at[slots], -1, outputs.shape[1])


def _check_range(name: str, numbers: Tensor, first: int, size: int) -> None:
    """On the CPU; looking at numbers on a GPU would wait for it."""
    if numbers.device.type == "cpu" and numbers.numel() and not first <= numbers.min() <= numbers.max() < size:
        raise RuntimeError(
            f"{name}: expected numbers in {first} ... {size - 1}, given {int(numbers.min())} ... {int(numbers.max())}"
        )
