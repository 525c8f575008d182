"""All randomness is a function of (seed, stream, numbers): never of a rank, a batch split or what ran before."""

import numpy as np
import torch
from torch import Tensor

STREAMS = ("noise", "draws", "prompts", "weights", "evaluation", "order")


def seed_of(seed: int, stream: str, *key: int) -> int:
    """A 63-bit seed for the numbers `key` of one of the `STREAMS`."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(seed: int, stream: str, *key: int) -> torch.Generator:
    """A CPU generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, stream, *key))


class TrajectoryNoise:
    """Gaussian noise of B trajectories, each from its own generator: the same for any batch and any device.

    Args:
        seeds: one seed a trajectory, from `seed_of`.
        sample_shape: (C, H, W).
        device: where the noise is wanted.
    """

    def __init__(self, seeds: list[int], sample_shape: tuple[int, ...], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.sample_shape, self.device = sample_shape, torch.device(device)

    def draw(self) -> Tensor:
        """The next noise `[B, C, H, W]`, float32. Nothing waits for the device."""
        shape = (len(self.generators), *self.sample_shape)
        noise = torch.empty(shape, pin_memory=self.device.type == "cuda")
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(self.sample_shape, generator=generator, out=row)
        return noise.to(self.device, non_blocking=True)
