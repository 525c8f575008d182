"""A step whose UNet computes its blocks again in the backward passes."""

import pytest
import torch

from tests.checks import relative_error
from tests.sharded import build, transitions


def gradients(rank: int, recompute: bool) -> torch.Tensor:
    torch.manual_seed(0)  # of the LoRA
    run = build(rank=rank)
    run.policy.optimise(checkpoint=recompute)
    run.step(transitions(0))
    return torch.cat([parameter.grad.flatten() for parameter in run.step.parameters])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_gradients_are_the_same(rank: int) -> None:
    """With look-ahead reward gradients and the reverse residual. Passes whose parameters are frozen, or whose adapter is off,
    are recomputed in the same way."""
    assert relative_error(gradients(rank, True), gradients(rank, False)) < 1e-6
