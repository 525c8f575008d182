"""What an optimizer update moves to and from memory, by purpose, from shapes alone.

Counted are the networks' passes as eager execution makes them, each operation reading its arguments and writing its
result; the trajectory buffer, written once and read once; and the gradients and the optimizer. Not counted are the
rewards, the arithmetic between passes (a few tensors of a latent's size by transition), what recomputing adds, and
evaluation. A compiled network moves less.
"""

import math

import torch

from fastnabla.config.methods import METHODS
from fastnabla.config.train import TrainConfig
from fastnabla.cost.planner import buffer_bytes
from fastnabla.cost.unit_costs import PassTraffic, UnitCosts
from fastnabla.methods.passes import StepCost
from fastnabla.optim.optimizer import expected_state_bytes


def update_traffic(config: TrainConfig, costs: UnitCosts, cost: StepCost) -> dict[str, int]:
    """Bytes read and written in an update, its share of the rollout included, by purpose.

    Args:
        config: the run, with its memory settings planned.
        costs: of its networks.
        cost: the training step's. Half of its passes are taken as backward, which is too many where the step samples.
    """
    memory, rollout = config.memory, config.rollout
    trajectories, micro_batch = (
        rollout.trajectories // rollout.updates,
        min(memory.micro_batch, max(map(math.ceil, cost.rows.values()))),
    )
    chunk, batch = min(memory.decode_chunk, micro_batch), min(rollout.batch, trajectories)
    unet, decoder = costs.unet_traffic(micro_batch), costs.decode_traffic(chunk)
    weights, shape = sum(costs.trained_sizes), torch.Size(costs.shapes.sample_shape)
    step = cost.total(cost.passes) / micro_batch * _both(unet) / 2 + cost.total(cost.decodes) / chunk * _both(decoder)
    # A row of the flow network passes it forward once and backward at twice the cost.
    step += cost.flow_passes / 3 / micro_batch * _both(costs.flow_traffic(micro_batch))
    sampled = stored = 0
    if METHODS[config.method].stores:
        sampled = trajectories * config.sampler.steps / batch * costs.unet_traffic(batch).forward
        sampled += trajectories / chunk * decoder.forward
        sampled /= rollout.epochs
        # Stored in the rollout; x, x' and the output of each transition are read and written when it is gathered.
        stored = (
            buffer_bytes(config, shape, trajectories) // rollout.epochs
            + 3 * 2 * 4 * sum(cost.rows.values()) * shape.numel()
        )
    return {
        "rollout": round(sampled),
        "network passes of the step": round(step),
        "trajectory buffer": stored,
        # Each micro-batch's gradients are added: two read, one written.
        "adding gradients": 12 * weights * sum(-(-count // micro_batch) for count in cost.rows.values()),
        # Clipping reads them for their norm, and scales them; the algorithm reads them, and reads and writes the weights
        # and its state.
        "optimizer": (12 + 12) * weights + 2 * expected_state_bytes(config.optimizer.name, costs.trained_sizes),
    }


def _both(traffic: PassTraffic) -> int:
    return traffic.forward + traffic.backward
