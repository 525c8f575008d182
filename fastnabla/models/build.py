"""Builds the networks of a run on its device, from its configuration."""

import dataclasses

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fastnabla.config.train import TrainConfig
from fastnabla.distributed.world import ALONE, World
from fastnabla.models.compiling import compiled
from fastnabla.models.decoder import Decoder
from fastnabla.models.flow import build_flow
from fastnabla.models.image_size import image_size, latent_shape
from fastnabla.models.pipeline import description_of, encode_prompts, family_of_pipeline, network_of, text_encoders
from fastnabla.models.policy import Policy
from fastnabla.models.sampler import use_sampler
from fastnabla.models.tiny_decoder import load_tiny_decoder
from fastnabla.prompts import RunPrompts
from fastnabla.transition import TransitionTable
from fastnabla.utils.seeding import seed_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """The networks and the sampler of a run."""

    policy: Policy
    flow: nn.Module | None
    """g_φ, if the method has one."""
    decoder: Decoder
    gradient_decoder: Decoder
    """Decoder for the reward gradients of the training step: `decoder`, or a tiny one."""
    table: TransitionTable
    """The sampler."""
    sample_shape: tuple[int, int, int]
    """(C, H, W) of the latents."""


def build_networks(
    pipeline: DiffusionPipeline, prompts: RunPrompts, config: TrainConfig, device: torch.device, world: World = ALONE
) -> Networks:
    """Build the networks of the run `config` from `pipeline`, whose network is finetuned in place.

    Args:
        pipeline: frozen.
        prompts: the run's prompts.
        config: the run's configuration, with the memory settings planned.
        device: where to compute.
        world: the ranks. They shard the weights if `config.is_sharded`.

    Raises:
        ValueError: the requested sampler, tiny decoder or attention is not available.
    """
    family, description = family_of_pipeline(pipeline), description_of(pipeline)
    size, sample_shape = image_size(config.model, description), latent_shape(config.model, description)
    table = use_sampler(pipeline, config.sampler, family.tokens(description.network, *sample_shape[1:]))
    # The text encoders leave the device before the network comes, because they can be larger than it.
    encoders = text_encoders(pipeline)
    for encoder in encoders:
        encoder.to(device)
    conditions = encode_prompts(pipeline, prompts.texts, size=size)
    for encoder in encoders:
        encoder.to("cpu")
    pipeline.vae.to(device)
    policy_seed, flow_seed = (seed_of(config.seed, "weights", number) for number in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(policy_seed)
        policy = Policy(
            network_of(pipeline).to(device),
            conditions,
            config.sampler.guidance_scale,
            config.lora.rank,
            config.lora.targets,
            family,
        ).to(device)
    if config.is_sharded(world.size):
        policy.shard(world)
    memory = config.memory
    kind = config.flow.kind if config.has_flow else "none"
    flow = build_flow(kind, sample_shape[0], policy.conditions.width, flow_seed, config.flow.start)
    if flow is not None:
        flow.to(device)

    compile, channels_last = resolve_compute(config, device, policy.is_sharded)
    policy.optimise(compile, config.compute.attention, channels_last, bool(memory.checkpoint_network))
    whole = compile == "whole"
    if flow is not None and whole:
        flow.forward = compiled(flow.forward)
    decoder = gradient_decoder = Decoder(
        pipeline.vae, memory.decode_chunk, bool(memory.checkpoint_decoder), whole, channels_last, config.backend
    )
    if config.model.tiny_decoder is not None:
        tiny = load_tiny_decoder(config.model.tiny_decoder, policy.dtype).to(device)
        gradient_decoder = Decoder(tiny, memory.decode_chunk, compile=whole, channels_last=channels_last)
    return Networks(
        policy=policy,
        flow=flow,
        decoder=decoder,
        gradient_decoder=gradient_decoder,
        table=table.to(device),
        sample_shape=sample_shape,
    )


def resolve_compute(config: TrainConfig, device: torch.device, sharded: bool) -> tuple[str, bool]:
    """What to compile and whether to use channels-last, with the defaults filled in."""
    compute, on_gpu = config.compute, device.type == "cuda"
    compile = compute.compile
    if compile == "auto":
        can_compile = on_gpu and not config.objective.reverse_second_order
        compile = ("blocks" if sharded else "whole") if can_compile else "none"
    return compile, on_gpu if compute.channels_last is None else compute.channels_last
