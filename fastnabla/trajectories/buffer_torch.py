"""The buffer's operations in plain torch: the specification, and the fallback where the extension is not built.

Names and arguments are those of `fastnabla.trajectories.buffer_ops`; results agree bit for bit. Slabs may be on another
device than the rest.
"""

import math

import torch
from torch import Tensor


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


def gather(
    states: Tensor,
    outputs: Tensor,
    scales: Tensor | None,
    state_at: Tensor,
    output_at: Tensor,
    steps: Tensor,
    prompt: Tensor,
    reward: Tensor,
    index: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = steps.shape[1]
    _check_range("index", index, 0, len(states) * kept)
    slots = index // kept
    step = steps[slots, index % kept]
    _check_range("steps", step, 0, output_at.shape[1])
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
        prompt[slots],
        slots,
        reward[slots],
    )


def quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rows `[R, E]` as int8, and a scale for every `block` elements, `[R, ⌈E / block⌉]` float32.

    The error of an element is at most half its scale, plus float32 rounding. A block with an infinity or a NaN becomes NaN.
    """
    rows, elements = x.shape
    blocks = -(-elements // block)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * block - elements)).view(rows, blocks, block)
    absmax = padded.abs().amax(2)
    # Divided by a tensor, since CUDA replaces division by a number with multiplication by its reciprocal.
    scales = absmax / torch.full_like(absmax, 127)
    scale = scales[:, :, None]
    ratio = torch.where(scale.isfinite() & (scale > 0), padded / scale, 0)
    q = ratio.round().clamp(-127, 127).to(torch.int8)
    return q.view(rows, blocks * block)[:, :elements].contiguous(), scales


def dequantise(q: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The rows that `quantise` encoded, as `dtype`."""
    return (q.float() * scales.repeat_interleave(block, 1)[:, : q.shape[1]]).to(dtype)


def _block_of(elements: int, blocks: int) -> int:
    """The power of two for which `blocks` blocks cover `elements`. It is unique unless `blocks` is 1."""
    for block in (1 << power for power in range(32)):
        if -(-elements // block) == blocks:
            return block
    raise RuntimeError(f"scales: expected one for every block of 2^k elements of a row of {elements}, given {blocks}")


def _write(slab: Tensor, scales: Tensor | None, slots: Tensor, positions: Tensor, values: Tensor) -> None:
    """Write rows of `values` to `slab[slot, position]` where the position is not negative."""
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
    """Only on a CPU: reading numbers on a GPU would wait for it."""
    if numbers.device.type == "cpu" and numbers.numel() and not first <= numbers.min() <= numbers.max() < size:
        raise RuntimeError(
            f"{name}: expected numbers in {first} ... {size - 1}, given {int(numbers.min())} ... {int(numbers.max())}"
        )
