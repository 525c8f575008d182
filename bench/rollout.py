"""Sampling speed of the policy, in images a second."""

import dataclasses
import statistics
from typing import Any

import torch

from bench.measure import quiet_clock, seconds, synchronised
from bench.variants import Variant
from bench.workload import PROMPTS, STEPS, Workload
from fastnabla.trajectories.rollout import sample
from fastnabla.transition import TransitionTable


def rollout(workload: Workload, variant: Variant, images: int, steps: int = 4) -> dict[str, Any]:
    """Sample `images` at once. Times the first `steps` steps and a decode, and scales the steps to all."""
    columns = {f.name: getattr(workload.table, f.name)[:steps] for f in dataclasses.fields(TransitionTable)}
    short, policy, decoder = TransitionTable(**columns), workload.policy(variant), workload.decoder(variant)
    prompt, backend = torch.arange(images) % PROMPTS, "triton" if variant.kernels else "torch"

    def walk() -> None:
        sample(policy, short, prompt, list(range(images)), workload.shape, backend=backend)

    def decode() -> None:
        decoder.decode(torch.zeros(images, *workload.shape, device=workload.device))

    walk(), decode()
    clock = quiet_clock(workload.device)
    walking, decoding = (
        statistics.median(seconds(synchronised(run), clock) for _ in range(3)) for run in (walk, decode)
    )
    whole = walking * STEPS / steps + decoding
    return {"images": images, "steps measured": steps, "images/s": images / whole, "of it decoding": decoding / whole}
