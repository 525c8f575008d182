"""Micro-batch, decode chunk and checkpointing that fit into a given memory, the fastest first."""

import dataclasses
import math
from collections.abc import Callable

import psutil
import torch
from rich.table import Table
from torch import nn

from fastnabla.config.methods import METHODS
from fastnabla.config.sections import MemoryConfig
from fastnabla.config.train import TrainConfig
from fastnabla.cost.reward_bytes import RewardBytes, reward_bytes
from fastnabla.cost.shapes import shapes_of
from fastnabla.cost.unit_costs import UnitCosts
from fastnabla.methods.registry import STEPS
from fastnabla.optim.optimizer import expected_state_bytes

CUDA_CONTEXT = 2**30
"""Assumed for the CUDA context and the libraries' workspaces; not yet measured on a GPU."""
SHARE = 0.92
"""Of the memory that may be planned with; the rest is for what an estimate does not see."""
ENOUGH = (4, 2, 1)
"""Transitions in a micro-batch below which recomputing is worth its arithmetic, in turn."""
MOST = 16
"""Transitions in a micro-batch beyond which a pass does not get faster."""
NO_REWARDS = RewardBytes(0, 0)


class DoesNotFit(ValueError):
    """Even the smallest setting needs more than there is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Settings, and what they are expected to take, in bytes by purpose.

    Not counted are the prompts' embeddings, whose number is not known before they are loaded (118 kB each for Stable
    Diffusion 1.5 in bfloat16), and the networks of a reward of your own.
    """

    micro_batch: int
    decode_chunk: int
    checkpoint_decoder: bool
    checkpoint_unet: bool
    budget: int
    fixed: dict[str, int]
    """Independent of the settings."""
    step: dict[str, int]
    """In the training step's two phases, of which the larger counts."""
    host: int = 0
    """Page-locked in the host's memory, beside the budget: the trajectory buffer, where it is pinned."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.fixed.values()) + max(self.step.values())

    def settings(self, memory: MemoryConfig) -> MemoryConfig:
        """`memory` with what it leaves open filled in."""
        planned = ("micro_batch", "decode_chunk", "checkpoint_decoder", "checkpoint_unet")
        return dataclasses.replace(memory, **{name: getattr(self, name) for name in planned})

    def table(self) -> Table:
        """The plan, to be printed."""
        table = Table(title=f"memory plan for {self.budget / 1e9:.1f} GB (an estimate, from the networks' shapes)")
        table.add_column("what")
        table.add_column("GB", justify="right")
        for name, size in (self.fixed | self.step).items():
            table.add_row(name, f"{size / 1e9:.2f}")
        if self.host:
            table.add_row("trajectory buffer, in the host's memory", f"{self.host / 1e9:.2f}")
        table.add_row("peak, in the larger phase of the step", f"{self.total / 1e9:.2f}", style="bold")
        for name in ("micro_batch", "decode_chunk", "checkpoint_decoder", "checkpoint_unet"):
            table.add_row(f"memory.{name}", str(getattr(self, name)))
        return table


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def plan_memory(
    config: TrainConfig,
    costs: UnitCosts,
    budget: int,
    device: torch.device,
    rewards: RewardBytes = NO_REWARDS,
    ranks: int = 1,
) -> MemoryPlan:
    """Settings of `config.memory` as they are, and for those that are None the fastest that fit.

    Recomputing nothing comes first, then as much of it as leaves room for a micro-batch of `ENOUGH` transitions. So the
    micro-batch may be larger with less memory, where the UNet is recomputed: each of the four backward passes of an inner
    transition then takes a forward pass more, 11 U instead of 7, which larger passes are not expected to make up for.

    Args:
        config: the run.
        costs: of its networks.
        budget: bytes that may be used in all.
        device: where it will run.
        rewards: of the reward networks.
        ranks: processes of the run, which may share its weights.

    Raises:
        DoesNotFit: not even one transition and one image at a time do.
    """
    memory = config.memory
    fixed = _fixed(config, costs, device, ranks) | {"reward networks": rewards.weights}
    room = int(SHARE * budget) - sum(fixed.values())
    step = STEPS[config.method]
    alive, most = step.graphs(config), min(MOST, *map(math.ceil, step.cost(config).rows.values()))
    options = [
        (unet, decoder)
        for unet in _open(memory.checkpoint_unet, (False, True))
        for decoder in _open(memory.checkpoint_decoder, (False, True))
    ]
    for enough in ENOUGH:
        for checkpoint_unet, checkpoint_decoder in options:
            for chunk in _open(memory.decode_chunk, (4, 2, 1)):
                settings = (chunk, checkpoint_unet, checkpoint_decoder, rewards.image)
                sizes = range(min(enough, most), most + 1) if memory.micro_batch is None else (memory.micro_batch,)
                fitting = [size for size in sizes if max(_step(costs, alive * size, *settings).values()) <= room]
                if fitting and (size := fitting[-1]) >= min(enough, most):
                    return MemoryPlan(
                        micro_batch=size,
                        decode_chunk=chunk,
                        checkpoint_decoder=checkpoint_decoder,
                        checkpoint_unet=checkpoint_unet,
                        budget=budget,
                        fixed=fixed,
                        step=_step(costs, alive * size, *settings),
                        host=_stored_bytes(config, costs) if _is_pinned(config, device) else 0,
                    )
    smallest = _step(costs, alive * (memory.micro_batch or 1), memory.decode_chunk or 1, *options[-1], rewards.image)
    needed = (sum(fixed.values()) + max(smallest.values())) / SHARE
    raise DoesNotFit(
        f"{'vram' if config.vram else 'free memory'} = {budget / 1e9:.1f} GB: the smallest setting needs about "
        f"{needed / 1e9:.1f} GB. Use a smaller model, --model.dtype bfloat16, --flow.kind conv or none, --memory.buffer "
        "pinned, or leave open what is set under memory."
    )


def planned(
    config: TrainConfig, device: torch.device, processes: int = 1, ranks: int = 1
) -> tuple[TrainConfig, MemoryPlan | None]:
    """`config` with its memory settings filled in, and the plan; None if nothing was open and no `vram` given.

    Args:
        config: the run.
        device: where it will run.
        processes: that have to share the memory of a CPU's machine.
        ranks: processes of the run, which may share its weights.

    Raises:
        DoesNotFit: see `plan_memory`.
        ValueError: the model's configuration cannot be read.
    """
    memory = config.memory
    if config.vram is None and memory.micro_batch is not None and memory.decode_chunk is not None:
        closed = {
            "checkpoint_decoder": bool(memory.checkpoint_decoder),
            "checkpoint_unet": bool(memory.checkpoint_unet),
        }
        return dataclasses.replace(config, memory=dataclasses.replace(memory, **closed)), None
    shared = processes if device.type == "cpu" else 1
    budget = int(config.vram * 1e9) if config.vram is not None else free_bytes(device) // shared
    costs = unit_costs(config)
    rewards = reward_bytes(config.reward, costs.shapes.pixels)
    plan = plan_memory(config, costs, budget, device, rewards, ranks)
    return dataclasses.replace(config, memory=plan.settings(memory)), plan


def unit_costs(config: TrainConfig) -> UnitCosts:
    """Costs of the networks of `config`."""
    return UnitCosts(shapes_of(config), guided=config.sampler.guidance_scale != 1)


def buffer_bytes(config: TrainConfig, sample_shape: torch.Size, trajectories: int) -> int:
    """Of the drawn transitions of `trajectories`: each state once, in float32, and the outputs. As many bytes of the
    host's memory are locked where the buffer is pinned, and no more."""
    drawn, block, size = config.drawn_steps + 1, config.memory.output_block, sample_shape.numel()
    output = size + 4 * math.ceil(size / block) if block else 4 * size
    return trajectories * (min(2 * drawn, config.sampler.steps + 1) * 4 * size + drawn * output)


def cache_bytes(config: TrainConfig, sample_shape: torch.Size, trajectories: int) -> int:
    """Of what later inner epochs have of the reference network, in float32 (`fastnabla.trajectories.reference_cache`)."""
    if config.rollout.epochs == 1 or not METHODS[config.method].has_reference:
        return 0
    with_product = config.has_flow and config.objective.reverse_weight > 0
    return 4 * (1 + with_product) * trajectories * (config.drawn_steps + 1) * sample_shape.numel()


def _open(value: bool | int | None, choices: tuple) -> tuple:
    return choices if value is None else (value,)


def _fixed(config: TrainConfig, costs: UnitCosts, device: torch.device, ranks: int) -> dict[str, int]:
    shapes, sharded = costs.shapes, config.is_sharded(ranks)
    parts = ranks if sharded else 1
    unet, flow = ([p.numel() for p in _trained(network)] for network in (shapes.unet, shapes.flow))
    in_dtype = sum(p.numel() for p in shapes.unet.parameters()) * shapes.dtype.itemsize
    frozen_copy = 0 if config.lora.rank else in_dtype
    gathered = 2 * in_dtype if sharded else 0  # both networks, in a step
    rest = _nbytes(shapes.vae) + _nbytes(shapes.flow)
    state = expected_state_bytes(config.optimizer.name, unet) // parts
    stored = config.rollout.trajectories * (1 + config.rollout.replay)
    return {
        "networks": (_nbytes(shapes.unet) + frozen_copy) // parts + gathered + rest,
        "gradients": 4 * (sum(unet) // parts + sum(flow)),
        f"state of {config.optimizer.name}": state + expected_state_bytes(config.optimizer.name, flow),
        "average of the weights": 4 * sum(unet) // parts if config.optimizer.ema else 0,
        "trajectory buffer": 0 if _is_pinned(config, device) else _stored_bytes(config, costs),
        "reference network's outputs": cache_bytes(config, torch.Size(shapes.sample_shape), stored),
        "CUDA context (assumed)": CUDA_CONTEXT if device.type == "cuda" or config.vram else 0,
    }


def _is_pinned(config: TrainConfig, device: torch.device) -> bool:
    return config.memory.buffer == "pinned" and device.type != "cpu"


def _stored_bytes(config: TrainConfig, costs: UnitCosts) -> int:
    if not METHODS[config.method].stores:
        return 0
    trajectories = config.rollout.trajectories * (1 + config.rollout.replay)
    return buffer_bytes(config, torch.Size(costs.shapes.sample_shape), trajectories)


def _trained(network: nn.Module | None) -> list[nn.Parameter]:
    return [] if network is None else [p for p in network.parameters() if p.requires_grad]


def _step(
    costs: UnitCosts, micro_batch: int, chunk: int, checkpoint_unet: bool, checkpoint_decoder: bool, reward: int = 0
) -> dict[str, int]:
    """While a chunk is decoded and rewarded, a UNet's graph is alive; in the backward passes g_φ's is beside it, over
    both states, and the new gradients."""
    decode = min(chunk, micro_batch) * (costs.decode_bytes(checkpoint_decoder) + reward)

    def kept(size: int) -> int:
        return costs.unet_bytes(checkpoint_unet, size).kept

    def peak(size: int) -> int:
        return costs.unet_bytes(checkpoint_unet, size).peak + costs.flow_bytes(2 * size).peak

    return {
        "step, while decoding": _at(micro_batch, kept) + decode,
        "step, in backward passes": _at(micro_batch, peak),
    }


def _at(micro_batch: int, bytes_of: Callable[[int], int]) -> int:
    """`bytes_of` the micro-batch, linear between 1 and `MOST` transitions: what a pass takes whatever their number
    (gradients, weights cast by autocast) is counted once, and in between a little more than is needed, since it is
    convex."""
    if micro_batch == 1:
        return bytes_of(1)
    most = max(MOST, micro_batch)
    return bytes_of(1) + (micro_batch - 1) * (bytes_of(most) - bytes_of(1)) // (most - 1)


def _nbytes(network: nn.Module | None) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters()) if network is not None else 0
