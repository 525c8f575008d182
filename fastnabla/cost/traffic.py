"""Memory traffic of an optimizer update, by purpose, from shapes alone.

Included are the networks' passes in eager execution, where each operation reads its arguments and writes its result; the
trajectory buffer, written once and read once; the gradients; and the optimizer. Not included are the rewards, the arithmetic
between passes (a few latent-sized tensors a transition), recomputation, and evaluation. Compiled networks move less.
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
    """Bytes read and written in an update, by purpose, including its part of the rollout.

    Args:
        config: the run's configuration, with the memory settings planned.
        costs: of its networks.
        cost: of the training step. Half of its passes are assumed to be backward passes, which overestimates steps that
            sample.
    """
    memory, rollout = config.memory, config.rollout
    trajectories = rollout.trajectories // rollout.updates
    micro_batch = min(memory.micro_batch, max(map(math.ceil, cost.rows.values())))
    chunk, batch = min(memory.decode_chunk, micro_batch), min(rollout.batch, trajectories)
    network, decoder = costs.network_traffic(micro_batch), costs.decode_traffic(chunk)
    weights, shape = sum(costs.trained_sizes), torch.Size(costs.shapes.sample_shape)
    step = cost.total(cost.passes) / micro_batch * _both(network) / 2 + cost.total(cost.decodes) / chunk * _both(
        decoder
    )
    # Each row passes the flow network forward, and backward at twice the cost.
    step += cost.flow_passes / 3 / micro_batch * _both(costs.flow_traffic(micro_batch))
    sampled = stored = 0
    if METHODS[config.method].stores:
        sampled = trajectories * config.sampler.steps / batch * costs.network_traffic(batch).forward
        sampled += trajectories / chunk * decoder.forward
        sampled /= rollout.epochs
        # The rollout stores the states and outputs. A gather reads and writes x, x' and the output of each transition.
        stored = (
            buffer_bytes(config, shape, trajectories) // rollout.epochs
            + 3 * 2 * 4 * sum(cost.rows.values()) * shape.numel()
        )
    return {
        "rollout": round(sampled),
        "network passes of the step": round(step),
        "trajectory buffer": stored,
        # Adding a micro-batch's gradients reads two tensors and writes one.
        "adding gradients": 12 * weights * sum(-(-count // micro_batch) for count in cost.rows.values()),
        # Clipping reads the gradients for their norm, then reads and scales them. The optimizer reads them, and reads and
        # writes the weights and its state.
        "optimizer": (12 + 12) * weights + 2 * expected_state_bytes(config.optimizer.name, costs.trained_sizes),
    }


def _both(traffic: PassTraffic) -> int:
    return traffic.forward + traffic.backward
