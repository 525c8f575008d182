"""All randomness is a function of (seed, stream, key). It never depends on the rank, the batch split or earlier draws."""

import numpy as np
import torch
from torch import Tensor

STREAMS = ("noise", "draws", "prompts", "weights", "evaluation", "order", "update", "reverse")


def seed_of(seed: int, stream: str, *key: int) -> int:
    """A 63-bit seed for `key` in one of the `STREAMS`."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(seed: int, stream: str, *key: int) -> torch.Generator:
    """A CPU generator seeded with `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, stream, *key))


class TrajectoryNoise:
    """Gaussian noise for B trajectories. Each has its own generator, so its noise does not depend on the batch or the device.

    Args:
        seeds: one seed per trajectory, from `seed_of`.
        sample_shape: (C, H, W).
        device: of the returned noise.
    """

    def __init__(self, seeds: list[int], sample_shape: tuple[int, ...], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.sample_shape, self.device = sample_shape, torch.device(device)

    def draw(self) -> Tensor:
        """The next noise `[B, C, H, W]`, float32. Does not synchronise with the device."""
        shape = (len(self.generators), *self.sample_shape)
        noise = torch.empty(shape, pin_memory=self.device.type == "cuda")
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(self.sample_shape, generator=generator, out=row)
        return noise.to(self.device, non_blocking=True)
