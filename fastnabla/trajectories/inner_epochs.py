"""Which of a round's trajectories each of its updates learns from: in inner epochs all of them, over and over."""

import torch
from torch import Tensor

from fastnabla.config.sections import RolloutConfig
from fastnabla.utils.seeding import generator_of


def learning_order(seed: int, round_: int, rollout: RolloutConfig) -> list[Tensor]:
    """Numbers of trajectories by update, `[trajectories / updates]` int64 each, for the `updates · epochs` of a round.

    The first inner epoch takes the trajectories in order, each later one in a random order of its own.

    Args:
        seed: of the run.
        round_: number of the round.
        rollout: settings.
    """
    orders = [torch.arange(rollout.trajectories)]
    for epoch in range(1, rollout.epochs):
        generator = generator_of(seed, "order", round_, epoch)
        orders.append(torch.randperm(rollout.trajectories, generator=generator))
    return [part for order in orders for part in order.chunk(rollout.updates)]
