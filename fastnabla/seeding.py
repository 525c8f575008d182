"""All randomness is a function of (seed, stream, numbers): never of a rank, a batch split or what ran before."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STREAMS = ("noise", "draws", "prompts", "weights", "evaluation")


def seed_of(seed: int, stream: str, *key: int) -> int:
    """A 63-bit seed for the numbers `key` of one of the `STREAMS`."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(seed: int, stream: str, *key: int) -> torch.Generator:
    """A CPU generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, stream, *key))


def trajectory_noise(seeds: Tensor, number: Tensor, sample_shape: tuple[int, ...]) -> Tensor:
    """Standard normals by (seed, number): the same for any batch, and up to rounding on any device.

    Channels 4q … 4q + 3 at position p share the Philox4x32-10 block (Salmon et al., SC 2011) whose key is the seed
    and whose counter is (p, q, number, 0); its four words become two Box–Muller pairs. The kernel `guided_step` draws
    the same. Computed on the CPU.

    Args:
        seeds: `[N]` int64.
        number: of the draw, `[N]` int64; its low 32 bits count.
        sample_shape: (C, …), or (D,) for a single channel.

    Returns:
        `[N, *sample_shape]` float32 on the device of `seeds`.
    """
    channels = sample_shape[0] if len(sample_shape) > 1 else 1
    positions = math.prod(sample_shape) // channels
    key, counter = (values.cpu().numpy().astype(np.uint64)[:, None, None] for values in (seeds, number))
    position, quad = np.arange(positions, dtype=np.uint64), np.arange(-(-channels // 4), dtype=np.uint64)[:, None]
    words = _philox((position, quad, counter & _LOW, np.uint64(0)), (key & _LOW, key >> _HALF))
    # A word becomes a float32 in [0, 1), by its value as a signed integer without the sign.
    signed = (
        np.broadcast_to(word, (len(seeds), *quad.shape[:1], positions)).astype(np.uint32).view(np.int32)
        for word in words
    )
    uniform = [torch.from_numpy(np.where(word < 0, -(word + 1), word)).float() * 4.6566127342e-10 for word in signed]
    pairs = []
    for u1, u2 in (uniform[:2], uniform[2:]):
        radius, angle = (-2 * u1.clamp(min=1e-7).log()).sqrt(), 2 * math.pi * u2
        pairs += [radius * angle.cos(), radius * angle.sin()]
    normals = torch.stack(pairs, 2).flatten(1, 2)[:, :channels]
    return normals.reshape(-1, *sample_shape).to(seeds.device)


_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _philox(counter: Sequence[np.ndarray], key: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ten rounds of Philox4x32 on 32-bit words held in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return [c0, c1, c2, c3]
