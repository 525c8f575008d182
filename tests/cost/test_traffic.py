"""What an update moves: sums by hand with made-up passes, and passes of small networks against their weights."""

import functools
import types

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fastnabla.config.model_sections import LORA_TARGETS, SamplerConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import MemoryConfig, RolloutConfig
from fastnabla.cost.shapes import Shapes, fake_weights
from fastnabla.cost.traffic import update_traffic
from fastnabla.cost.unit_costs import PassBytes, PassTraffic, UnitCosts
from fastnabla.cost.update_cost import update_cost
from fastnabla.methods.passes import StepCost
from fastnabla.models.description import Description
from fastnabla.models.families import SD
from fastnabla.models.flow import UNetFlow
from fastnabla.models.lora import add_lora
from fastnabla.utils.tensor_bytes import LiveBytes, MovedBytes
from tests.bench.toy import ONE_LEVEL
from tests.families import one_level


def made_up_costs() -> types.SimpleNamespace:
    """A pass takes its weights, 1000 bytes, once, and by row 10 forward and 30 backward; and so on."""
    return types.SimpleNamespace(
        shapes=types.SimpleNamespace(sample_shape=(2, 3, 3)),
        trained_sizes=[100, 50],
        network_traffic=lambda rows: PassTraffic(1000 + 10 * rows, 1000 + 30 * rows),
        decode_traffic=lambda images: PassTraffic(500 + 7 * images, 500 + 9 * images),
        flow_traffic=lambda rows: PassTraffic(60 + rows, 80 + rows),
    )


def test_sums_by_hand() -> None:
    """8 trajectories of 10 steps, one update: 16 inner transitions and 8 last ones, 4 at a time."""
    config = TrainConfig(
        updates=2,
        sampler=SamplerConfig(steps=10),
        rollout=RolloutConfig(trajectories=8, fraction=0.2, updates=1, batch=4),
        memory=MemoryConfig(micro_batch=4, decode_chunk=2),
    )
    step = StepCost(
        rows={"inner": 16, "last": 8},
        passes={"inner": 7, "last": 3},
        decodes={"inner": 2, "last": 1},
        flow_passes=3 * (16 * 2 + 8),
    )
    traffic = update_traffic(config, made_up_costs(), step)
    # 20 passes of 4 trajectories, and 4 decodes of 2 images.
    assert traffic["rollout"] == 20 * 1040 + 4 * 514
    # 136 U in passes of 4 rows, half forward; 40 decodes in twos; g at 16 × 2 + 8 states, 4 at a time.
    assert traffic["network passes of the step"] == 34 * (1040 + 1120) // 2 + 20 * (514 + 518) + 10 * (64 + 84)
    # Of 3 drawn steps, 6 states and 3 outputs of 18 numbers; 24 transitions of 3 tensors, read and written.
    assert traffic["trajectory buffer"] == 4 * 18 * (8 * (6 + 3) + 24 * 3 * 2)
    assert traffic["adding gradients"] == 12 * 150 * (4 + 2)
    # AdamW: two moments of 150 numbers, and a counter for each of two tensors.
    assert traffic["optimizer"] == 24 * 150 + 2 * (2 * 4 * 150 + 2 * 4)


@functools.cache
def small_costs() -> UnitCosts:
    architecture = one_level("sd15")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architecture.network).requires_grad_(False)
        vae, flow = AutoencoderKL.from_config(architecture.vae), UNetFlow(4, 16, ONE_LEVEL.flow)
        description = Description(family=SD, network=unet.config, vae=vae.config, lengths=SD.text_lengths)
        shapes = Shapes(unet, vae, flow, torch.float32, description, (4, 8, 8))
    add_lora(unet, 2, LORA_TARGETS)
    return UnitCosts(shapes, guided=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_pass_counts_every_number_of_rows(checkpoint: bool) -> None:
    """As a pass of that number, to the byte."""
    costs = small_costs()
    network = costs.shapes.network
    for transitions in (1, 5):
        if checkpoint:
            network.enable_gradient_checkpointing()
        with fake_weights(network), LiveBytes() as memory, MovedBytes() as moved:
            parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
            x, output = costs._network("cpu", transitions)
            kept, forward = memory.live, moved.total
            torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True)
            backward = moved.total - forward
            torch.autograd.grad(output, parameters, torch.ones_like(output))
        network.disable_gradient_checkpointing()
        assert costs.network_bytes(checkpoint, transitions) == PassBytes(kept, memory.peak)
        assert checkpoint or costs.network_traffic(transitions) == PassTraffic(forward, backward)


@pytest.mark.slow
def test_passes_read_their_weights_once() -> None:
    """Whatever the rows, of which each moves more than its graph keeps; a backward pass moves more than a forward one."""
    costs = small_costs()
    weights = 4 * sum(parameter.numel() for parameter in costs.shapes.network.parameters())
    one, two = costs.network_traffic(1), costs.network_traffic(2)
    by_row = two.forward - one.forward
    assert one.forward - by_row == pytest.approx(weights, rel=0.02)
    assert one.forward < one.backward < 4 * one.forward
    assert costs.network_bytes(False).kept < by_row
    decode = costs.decode_traffic(1)
    assert decode.forward < decode.backward < 4 * decode.forward


@pytest.mark.slow
def test_update_has_its_traffic() -> None:
    config, costs = TrainConfig(memory=MemoryConfig(micro_batch=2, decode_chunk=1)), small_costs()
    cost = update_cost(config, costs)
    assert cost.traffic == update_traffic(config, costs, cost.step)
    assert all(moved > 0 for moved in cost.traffic.values())
