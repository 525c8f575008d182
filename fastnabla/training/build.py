"""Builds the components of a run from its configuration."""

import dataclasses
import functools
import math

import torch
from torch import Tensor, nn

from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import TESTBED
from fastnabla.config.train import TrainConfig
from fastnabla.cost.planner import planned
from fastnabla.debug.anomaly import Anomalies
from fastnabla.distributed.devices import device_of
from fastnabla.distributed.world import ALONE, World
from fastnabla.methods.accumulation import Accumulation
from fastnabla.methods.registry import STEPS
from fastnabla.metrics.evaluation import Evaluator
from fastnabla.metrics.probes import build_probe
from fastnabla.models.build import Networks, build_networks
from fastnabla.models.decoder import Decoder
from fastnabla.models.image_size import image_size
from fastnabla.models.pipeline import description_of, pipeline_of, reading_tokenizers
from fastnabla.models.policy import Policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.optim.optimizer import Optimizer
from fastnabla.prompts import RunPrompts, prompts_of, used_prompts, warn_truncated
from fastnabla.rewards import RewardSum, check_reward, reward_of
from fastnabla.run.state import TrainState
from fastnabla.testbed.silhouettes import IMAGE_SIZE
from fastnabla.training.check_model import check_model
from fastnabla.training.guards import require_measurable
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.collection import RolloutCollector, Sampler, rank_ranges
from fastnabla.trajectories.pooled_buffer import PooledBuffer
from fastnabla.trajectories.sources import Source, StoredTrajectories, UnsampledTrajectories, reverse_factors
from fastnabla.transition import TransitionTable
from fastnabla.utils.determinism import make_deterministic
from fastnabla.utils.seeding import seed_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Everything a run consists of, in one process."""

    config: TrainConfig
    """With its memory settings planned."""
    world: World
    device: torch.device
    prompts: RunPrompts
    reward: RewardSum
    probe: object | None
    """See `fastnabla.metrics.probes`."""
    policy: Policy
    flow: nn.Module | None
    """g_φ."""
    decoder: Decoder
    table: TransitionTable
    """The sampler's steps."""
    sample_shape: tuple[int, int, int]
    """(C, H, W) of the latents."""
    step: Accumulation
    """The method's training step: trajectories to gradients."""
    slots: Tensor
    """Numbers of this rank's trajectories of a rollout, `[n]` int64."""
    sampler: Sampler
    buffer: TrajectoryBuffer | None
    """This rank's. None for a method that stores no trajectories."""
    source: Source
    optimizer: Optimizer
    ema: WeightAverage | None
    evaluator: Evaluator
    state: TrainState
    """The parts of these that a checkpoint saves."""
    anomalies: Anomalies


def plan_and_build(config: TrainConfig, prompts: RunPrompts | None = None, world: World = ALONE) -> Components:
    """Plan the memory settings that `config` leaves open, and build.

    Args:
        config, prompts, world: see `build_components`.

    Raises:
        ValueError: see `build_components`, `check_model` and `fastnabla.cost.planner.planned`.
    """
    if config.deterministic:
        make_deterministic()  # planning may start CUDA
    check_model(config)
    prompts = _read_prompts(config, world) if prompts is None else prompts
    config, _ = planned(config, device_of(config, world.rank_info), world.local_size, world.size, len(prompts.texts))
    return build_components(config, prompts, world)


def build_components(config: TrainConfig, prompts: RunPrompts | None = None, world: World = ALONE) -> Components:
    """Build everything that the run `config` consists of, and check all input: prompts, model, sampler, reward, probe.

    Nothing is sampled or trained yet.

    Args:
        config: with its memory settings planned.
        prompts: those in the folder of an interrupted run; None to load those that `config` names.
        world: the ranks that train together. Each builds its own components.

    Raises:
        ValueError: a setting is wrong. The message names the field, its value and a remedy.
    """
    rollout, memory, seed = config.rollout, config.memory, config.seed
    ranges = rank_ranges(world, rollout.trajectories, rollout.updates)
    device = device_of(config, world.rank_info)
    config.check_tracker()
    if config.deterministic:
        make_deterministic()

    # Inputs
    probe = build_probe(config.evaluation.probe, device)
    require_measurable(config.evaluation, probe)
    prompts = _read_prompts(config, world) if prompts is None else prompts
    reward = reward_of(config.reward, config.model.random_init, device)

    # Networks
    pipeline = pipeline_of(config.model)
    size = image_size(config.model, description_of(pipeline))
    _require_testbed_size(config, reward, size)
    check_reward(reward, prompts.texts, size, device)
    used = used_prompts(prompts, seed, config.sampled_trajectories, config.prompts.draw).tolist()
    warn_truncated([prompts.texts[i] for i in used], *reading_tokenizers(pipeline))
    networks = build_networks(pipeline, prompts, config, device, world)
    policy, flow = networks.policy, networks.flow

    # Training step
    step = STEPS[config.method].build(config, networks, reward, prompts.texts)
    step.world = world
    fix_rows(config, policy, step, world)

    # Trajectories. The buffer comes first: it raises if there are more trajectories than fit into memory.
    buffer = _buffer(config, networks, sum(map(len, ranges)), device) if METHODS[config.method].stores else None
    slots = torch.cat([torch.arange(part.start, part.stop) for part in ranges])
    sampler = Sampler(config, policy, networks.table, networks.sample_shape, world)
    source: Source = UnsampledTrajectories(
        seed, rollout.trajectories, prompts.trained, config.prompts.draw, rollout.updates
    )
    if buffer is not None:
        rollouts = RolloutCollector(sampler, networks.decoder, reward, prompts, buffer, slots)
        factors = reverse_factors(seed, rollout, config.drawn_steps, config.reverse_fraction)
        source = StoredTrajectories(
            rollouts, buffer, slots, config.num_rollouts, rollout.replay, reverse_factors=factors
        )

    # Optimizer
    optimizer = Optimizer(policy, flow, config.optimizer, config.flow, config.updates)
    decay = config.optimizer.ema
    ema = None if decay is None else WeightAverage(policy.trained(), decay, policy.updating)

    # Evaluation
    samples = config.evaluation.samples
    evaluator = Evaluator(
        functools.partial(_evaluation_latents, sampler, prompts.evaluated.start, samples, seed),
        networks.decoder,
        reward,
        probe,
        [prompts.texts[i] for i in prompts.evaluated],
        samples,
        memory.decode_chunk,
        world,
    )

    pooled = buffer if world.size == 1 or buffer is None else PooledBuffer(buffer, world, slots, rollout.trajectories)
    return Components(
        config=config,
        world=world,
        device=device,
        prompts=prompts,
        reward=reward,
        probe=probe,
        policy=policy,
        flow=flow,
        decoder=networks.decoder,
        table=networks.table,
        sample_shape=networks.sample_shape,
        step=step,
        slots=slots,
        sampler=sampler,
        buffer=buffer,
        source=source,
        optimizer=optimizer,
        ema=ema,
        evaluator=evaluator,
        state=TrainState(
            policy=policy, flow=flow, optimizer=optimizer, reward=reward, step=step, buffer=pooled, ema=ema
        ),
        anomalies=Anomalies(policy=policy, flow=flow, reward=reward, step=step, world=world),
    )


def _read_prompts(config: TrainConfig, world: World) -> RunPrompts:
    """The prompts that `config` names, which rank 0 reads for all ranks."""
    read = functools.partial(prompts_of, config.prompts, config.evaluation.prompts, config.seed)
    return RunPrompts.from_json(world.broadcast(lambda: read().to_json()))


def fix_rows(config: TrainConfig, policy: Policy, step: Accumulation, world: World) -> None:
    """Fix the rows of a compiled policy's passes, in rollouts too, to those of the step's largest micro-batch.

    Call it again when `step.micro_batch` has changed.
    """
    if policy.compile != "none":
        most = math.ceil(max(STEPS[config.method].cost(config).rows.values()) / world.size)
        policy.static_rows = (math.ceil(most / math.ceil(most / step.micro_batch)),)


def _require_testbed_size(config: TrainConfig, reward: RewardSum, size: tuple[int, int]) -> None:
    """Check that the testbed's classifiers, if the run uses them, are given images of the size that they were trained on.

    Raises:
        ValueError: they are not.
    """
    uses = [f"evaluation.probe = {TESTBED!r}"] if config.evaluation.probe == TESTBED else []
    uses += ["reward.terms = classifier"] if "classifier" in reward.terms else []
    if uses and size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"{', '.join(uses)}: the testbed's classifier judges images of {IMAGE_SIZE} × {IMAGE_SIZE} pixels, and those of "
            f"this run have {size[0]} × {size[1]}; choose another, or leave model.height and model.width of the testbed at None."
        )


def _buffer(config: TrainConfig, networks: Networks, trajectories: int, device: torch.device) -> TrajectoryBuffer:
    """A buffer for `trajectories` trajectories of each rollout that is kept."""
    rollout, memory = config.rollout, config.memory
    buffer = TrajectoryBuffer(
        trajectories * (1 + rollout.replay),
        len(networks.table),
        config.drawn_steps + 1,
        networks.sample_shape,
        device=device,
        storage=memory.buffer,
        output_block=memory.output_block,
    )
    if config.caches_reference:
        buffer.keep_reference(with_product=config.has_flow and config.objective.reverse_weight > 0)
    return buffer


def _evaluation_latents(sampler: Sampler, first: int, samples: int, seed: int, rows: Tensor, noise: int) -> Tensor:
    """Finished latents of an evaluation's samples `rows`, see `fastnabla.metrics.evaluation.LatentSampler`.

    Args:
        sampler: the run's.
        first: number of the first prompt that is evaluated.
        samples: per prompt.
        seed: of the run.
        rows: numbers of samples, prompt by prompt, `[n]` int64.
        noise: selects the noise.
    """
    seeds = [seed_of(seed, "evaluation", noise, row) for row in rows.tolist()]
    return sampler(rows // samples + first, seeds)
