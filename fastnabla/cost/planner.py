"""Chooses the fastest micro-batch, decode chunk and checkpointing that fit into a given memory."""

import bisect
import dataclasses
import functools
import math

import psutil
import torch
from rich.table import Table
from torch import nn

from fastnabla.config.fields import dotted
from fastnabla.config.methods import METHODS
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import MemoryConfig
from fastnabla.cost.reward_bytes import RewardBytes, reward_bytes
from fastnabla.cost.shapes import shapes_of
from fastnabla.cost.unit_costs import UnitCosts
from fastnabla.methods.registry import STEPS
from fastnabla.models.cached_conditions import DEVICE_BYTES
from fastnabla.models.fitting import checked_description
from fastnabla.models.quantised_linear import weight_bytes
from fastnabla.optim.optimizer import expected_state_bytes

CUDA_CONTEXT = 2**30
"""Bytes assumed for the CUDA context and library workspaces; not yet measured on a GPU."""
USABLE_FRACTION = 0.92
"""Fraction of the budget that a plan may use; the rest is a margin for what the estimate misses."""
ENOUGH = (4, 2, 1)
"""Micro-batch sizes that are worth recomputing for, in order of preference."""
MAX_MICRO_BATCH = 16
"""Micro-batch size beyond which a transition's passes do not get cheaper."""
SMALLER = (
    ("model.dtype", "float32", "bfloat16"),
    ("model.quantise", "none", "nf4"),
    ("flow.kind", "unet", "conv"),
    ("flow.kind", "unet", "none"),
    ("flow.kind", "conv", "none"),
    ("memory.buffer", "device", "pinned"),
)
"""Fields, a value, and another with which a run needs less memory."""
NO_REWARDS = RewardBytes(0, 0)
_COUNTED: dict[str, UnitCosts] = {}
"""By what the networks depend on."""


class DoesNotFit(ValueError):
    """Even the smallest settings need more memory than there is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory settings and their expected memory, in bytes by purpose.

    Not included are the networks of custom rewards, and the text encoders, which are on the device only while they encode.
    """

    micro_batch: int
    decode_chunk: int
    checkpoint_decoder: bool
    checkpoint_network: bool
    budget: int
    fixed: dict[str, int]
    """Bytes that do not depend on the settings."""
    step: dict[str, int]
    """Bytes in the training step's two phases; the larger one counts."""
    host: int = 0
    """Pinned host memory of the trajectory buffer, not part of the budget."""

    @property
    def total(self) -> int:
        """Peak bytes."""
        return sum(self.fixed.values()) + max(self.step.values())

    def settings(self, memory: MemoryConfig) -> MemoryConfig:
        """`memory` with unset fields filled in from the plan."""
        planned = ("micro_batch", "decode_chunk", "checkpoint_decoder", "checkpoint_network")
        return dataclasses.replace(memory, **{name: getattr(self, name) for name in planned})

    def table(self) -> Table:
        """The plan as a table to print."""
        table = Table(title=f"memory plan for {self.budget / 1e9:.1f} GB (an estimate, from the networks' shapes)")
        table.add_column("what")
        table.add_column("GB", justify="right")
        for name, size in (self.fixed | self.step).items():
            table.add_row(name, f"{size / 1e9:.2f}")
        if self.host:
            table.add_row("trajectory buffer, in host memory", f"{self.host / 1e9:.2f}")
        table.add_row("peak, in the larger phase of the step", f"{self.total / 1e9:.2f}", style="bold")
        for name in ("micro_batch", "decode_chunk", "checkpoint_decoder", "checkpoint_network"):
            table.add_row(f"memory.{name}", str(getattr(self, name)))
        return table


def free_bytes(device: torch.device) -> int:
    """Free memory of `device`: the GPU's, with what PyTorch's allocator holds unused, or the machine's for a CPU."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def plan_memory(
    config: TrainConfig,
    costs: UnitCosts,
    budget: int,
    device: torch.device,
    rewards: RewardBytes = NO_REWARDS,
    ranks: int = 1,
    prompts: int | None = None,
) -> MemoryPlan:
    """Keep the fields of `config.memory` that are set, and choose the fastest values that fit for those that are None.

    Plans without recomputation are preferred. Next come those that recompute the least and still allow a micro-batch of
    `ENOUGH` transitions. So a smaller budget can lead to a larger micro-batch, with the UNet recomputed. Each of the four
    backward passes of an inner transition then takes one more forward pass, 11 U instead of 7. A larger micro-batch is not
    expected to make up for that.

    Args:
        config: the run's configuration.
        costs: of its networks.
        budget: bytes that may be used in total.
        device: where the run computes.
        rewards: bytes of the reward networks.
        ranks: number of ranks, which may shard the weights.
        prompts: number of prompts; None for as many as the device can hold.

    Raises:
        DoesNotFit: not even one transition and one image at a time fit.
    """
    memory = config.memory
    fixed = _fixed(config, costs, device, ranks) | {"reward networks": rewards.weights}
    fixed["prompt embeddings"] = embedding_bytes(config, costs, prompts)
    room = int(USABLE_FRACTION * budget) - sum(fixed.values())
    step = STEPS[config.method]
    alive, most = step.graphs(config), min(MAX_MICRO_BATCH, *map(math.ceil, step.cost(config).rows.values()))
    recompute = (False,) if config.objective.reverse_second_order else (False, True)
    options = [
        (network, decoder)
        for network in _open(memory.checkpoint_network, recompute)
        for decoder in _open(memory.checkpoint_decoder, (False, True))
    ]
    for enough in ENOUGH:
        for checkpoint_network, checkpoint_decoder in options:
            for chunk in _open(memory.decode_chunk, (4, 2, 1)):
                settings = (chunk, checkpoint_network, checkpoint_decoder, rewards.image)
                sizes = range(min(enough, most), most + 1) if memory.micro_batch is None else (memory.micro_batch,)
                bytes_of = functools.partial(_largest, costs, alive, settings)
                fitting = bisect.bisect_right(sizes, room, key=bytes_of)
                if fitting and (size := sizes[fitting - 1]) >= min(enough, most):
                    return MemoryPlan(
                        micro_batch=size,
                        decode_chunk=chunk,
                        checkpoint_decoder=checkpoint_decoder,
                        checkpoint_network=checkpoint_network,
                        budget=budget,
                        fixed=fixed,
                        step=_step(costs, alive * size, *settings),
                        host=_stored_bytes(config, costs) if _is_pinned(config, device) else 0,
                    )
    smallest = _step(costs, alive * (memory.micro_batch or 1), memory.decode_chunk or 1, *options[-1], rewards.image)
    needed = (sum(fixed.values()) + max(smallest.values())) / USABLE_FRACTION
    raise DoesNotFit(
        f"{'vram' if config.vram else 'free memory'} = {budget / 1e9:.1f} GB: the smallest settings need about "
        f"{needed / 1e9:.1f} GB. Use {' or '.join(['a smaller model', *_smaller(config)])}; or unset memory.micro_batch, "
        "decode_chunk and checkpoint_*, which are then planned."
    )


def _largest(costs: UnitCosts, alive: int, settings: tuple[int, bool, bool, int], size: int) -> int:
    """Bytes of the larger phase of a step with micro-batches of `size`."""
    return max(_step(costs, alive * size, *settings).values())


def _smaller(config: TrainConfig) -> list[str]:
    """Options of the method with which the run would need less memory."""
    values, method = dotted(config), METHODS[config.method]
    return [
        f"--{field} {value}"
        for field, now, value in SMALLER
        if values[field] == now and method.accepts(field, value) and (field != "model.quantise" or config.lora.rank)
    ]


def planned(
    config: TrainConfig, device: torch.device, processes: int = 1, ranks: int = 1, prompts: int | None = None
) -> tuple[TrainConfig, MemoryPlan | None]:
    """`config` with its memory settings filled in, and the plan; None if all were set and `vram` was not.

    Args:
        config: the run's configuration.
        device: where the run computes.
        processes: number of processes that share the machine's memory, for a run on the CPU.
        ranks: number of ranks, which may shard the weights.
        prompts: number of prompts; None for as many as the device can hold.

    Raises:
        DoesNotFit: see `plan_memory`.
        ValueError: the model's configuration cannot be read.
    """
    memory = config.memory
    if config.vram is None and memory.micro_batch is not None and memory.decode_chunk is not None:
        closed = {
            "checkpoint_decoder": bool(memory.checkpoint_decoder),
            "checkpoint_network": bool(memory.checkpoint_network),
        }
        return dataclasses.replace(config, memory=dataclasses.replace(memory, **closed)), None
    shared = processes if device.type == "cpu" else 1
    budget = int(config.vram * 1e9) if config.vram is not None else free_bytes(device) // shared
    costs = unit_costs(config)
    rewards = reward_bytes(config.reward, costs.shapes.image_size)
    plan = plan_memory(config, costs, budget, device, rewards, ranks, prompts)
    return dataclasses.replace(config, memory=plan.settings(memory)), plan


def unit_costs(config: TrainConfig) -> UnitCosts:
    """Costs of the networks of `config`, which are counted once in a process."""
    scale, flow = config.sampler.guidance_scale, config.flow.kind if config.has_flow else "none"
    networks = repr((checked_description(config.model), config.model, config.lora, flow, scale))
    if networks not in _COUNTED:
        shapes = shapes_of(config)
        is_input = bool(shapes.description.family.guidance_input(shapes.network, scale))
        _COUNTED[networks] = UnitCosts(shapes, guided=scale != 1 and not is_input)
    return _COUNTED[networks]


def buffer_bytes(config: TrainConfig, sample_shape: torch.Size, trajectories: int) -> int:
    """Bytes of the trajectory buffer for the drawn transitions of `trajectories`: each state once, in float32, and the model
    outputs. A pinned buffer locks exactly as many bytes of host memory."""
    drawn, block, size = config.drawn_steps + 1, config.memory.output_block, sample_shape.numel()
    output = size + 4 * math.ceil(size / block) if block else 4 * size
    return trajectories * (min(2 * drawn, config.sampler.steps + 1) * 4 * size + drawn * output)


def cache_bytes(config: TrainConfig, sample_shape: torch.Size, trajectories: int) -> int:
    """Bytes of the reference network's results, cached for later inner epochs in float32
    (`fastnabla.trajectories.reference_cache`)."""
    if not config.caches_reference:
        return 0
    with_product = config.has_flow and config.objective.reverse_weight > 0
    return 4 * (1 + with_product) * trajectories * (config.drawn_steps + 1) * sample_shape.numel()


def embedding_bytes(config: TrainConfig, costs: UnitCosts, prompts: int | None = None) -> int:
    """Bytes of the prompts' embeddings on the device (`fastnabla.models.cached_conditions`): of all `prompts`, or at most
    `DEVICE_BYTES`, or more for the trajectories of a rollout's batch or of an update. None stands for a long list."""
    rollout, shapes = config.rollout, costs.shapes
    each = shapes.dtype.itemsize * sum(map(math.prod, shapes.description.embedding_shapes.values()))
    at_once = max(rollout.batch, math.ceil(rollout.trajectories / rollout.updates))
    most = max(DEVICE_BYTES, (1 + at_once) * each)
    return most if prompts is None else min(most, (1 + prompts) * each)


def _open(value: bool | int | None, choices: tuple) -> tuple:
    return choices if value is None else (value,)


def _fixed(config: TrainConfig, costs: UnitCosts, device: torch.device, ranks: int) -> dict[str, int]:
    shapes, sharded = costs.shapes, config.is_sharded(ranks)
    parts = ranks if sharded else 1
    network, flow = ([p.numel() for p in _trained(each)] for each in (shapes.network, shapes.flow))
    in_dtype = sum(p.numel() for p in shapes.network.parameters()) * shapes.dtype.itemsize
    frozen_copy = 0 if config.lora.rank else in_dtype
    gathered = 2 * in_dtype if sharded else 0  # both networks are whole during a step
    rest = weight_bytes(shapes.vae) + (0 if shapes.flow is None else weight_bytes(shapes.flow))
    state = expected_state_bytes(config.optimizer.name, network) // parts
    stored = config.rollout.trajectories * (1 + config.rollout.replay)
    return {
        "networks": (weight_bytes(shapes.network) + frozen_copy) // parts + gathered + rest,
        "gradients": 4 * (sum(network) // parts + sum(flow)) + 4 * sum(network) * STEPS[config.method].sums_gradients,
        f"state of {config.optimizer.name}": state + expected_state_bytes(config.optimizer.name, flow),
        "average of the weights": 4 * sum(network) // parts if config.optimizer.ema else 0,
        "average of the flow": 4 * sum(flow) if config.follows_reference and config.flow.average else 0,
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
    costs: UnitCosts, micro_batch: int, chunk: int, checkpoint_network: bool, checkpoint_decoder: bool, reward: int = 0
) -> dict[str, int]:
    """While a chunk is decoded and rewarded, the UNet's graph is alive. During the backward passes, so are g_φ's graph over
    both states and the new gradients."""
    network = costs.network_bytes(checkpoint_network, micro_batch)
    return {
        "step, while decoding": network.kept
        + min(chunk, micro_batch) * (costs.decode_bytes(checkpoint_decoder) + reward),
        "step, in backward passes": network.peak + costs.flow_bytes(2 * micro_batch).peak,
    }
