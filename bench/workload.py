"""The training steps that `bench.whole_step` times, with randomly initialised networks."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bench.models import Model
from bench.naive import naive_step
from bench.published import ddim_table
from bench.variants import Variant
from fastnabla.cost.shapes import Shapes
from fastnabla.cost.unit_costs import UnitCosts
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.models.conditions import Conditions
from fastnabla.models.decoder import Decoder
from fastnabla.models.description import Description
from fastnabla.models.families import SD, SDXL
from fastnabla.models.flow import UNetFlow
from fastnabla.models.lora import LoraLinear
from fastnabla.models.policy import Policy
from fastnabla.models.quantised_linear import quantise_linear_layers
from fastnabla.models.random_init import default_dtype
from fastnabla.objective.gaussian import full
from fastnabla.objective.ops import PLAIN
from fastnabla.objective.settings import Objective
from fastnabla.rewards.aesthetic import Aesthetic
from fastnabla.rewards.head import ScoreHead
from fastnabla.rewards.options import RewardOptions
from fastnabla.trajectories.draws import DRAWS, draw_reverse
from fastnabla.trajectories.transitions import LazyTransitions, Transitions

STEPS, DRAWN, PROMPTS = 50, 6, 4
FIRST = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
"""The kernel that `Variant.attention` prefers."""


class WholeDecoder(Decoder):
    """diffusers' decoder with plain autograd."""

    def forward(self, latents: Tensor) -> Tensor:
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return (full(self.vae.decode(latents, return_dict=False)[0]) / 2 + 0.5).clamp(0, 1)


class Reward(nn.Module):
    """A cheap differentiable reward: two convolutions of the image, resized as by the published rewards."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.net = nn.Sequential(nn.Conv2d(3, 16, 8, 4), nn.SiLU(), nn.Conv2d(16, 1, 3)).requires_grad_(False)

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        images = nn.functional.interpolate(images, (self.pixels, self.pixels), mode="bilinear", antialias=True)
        return self.net(images).mean((1, 2, 3))


def vision_reward(config: dict[str, Any], precision: str, device: torch.device) -> Aesthetic:
    """The aesthetic reward with random weights and the CLIP tower `config`."""
    with torch.device(device):
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        head = ScoreHead(clip.config.projection_dim)
    return Aesthetic(clip, head, RewardOptions(precision=precision))


def preferring(attention: str) -> contextlib.AbstractContextManager:
    """Within the context, torch's attention prefers the kernel of `FIRST`, and falls back to others where that one cannot
    run, as for a head size of 160."""
    if attention not in FIRST:
        return contextlib.nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(list(dict.fromkeys([FIRST[attention], *others])), set_priority=True)


class PeftLinear(LoraLinear):
    """The adapter as in PEFT's layer: computed in float32, from a copy of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.is_on:
            return y
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        down, up = self.factors(x)
        return y + nn.functional.linear(nn.functional.linear(x, down), up).to(y.dtype)


class Mixed(nn.Module):
    """g_φ under autocast, as in `BalanceStep`."""

    def __init__(self, flow: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.flow, self.enabled = flow, enabled

    def forward(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.enabled):
            return self.flow(x, timestep, embeddings)


def partly_reversed(batch: Transitions, variant: Variant) -> LazyTransitions:
    """The `variant.reverse_fraction` of `batch`'s inner transitions with a reverse residual. The batch has the steps of its
    trajectories one after the other, the last one last."""
    inner = (len(batch) // DRAWN, DRAWN - 1)
    factors = draw_reverse(0, 0, *inner, variant.reverse_fraction, whole=variant.draw == "runs").T.flatten()
    return dataclasses.replace(batch.select(), reverse_factor=torch.cat([factors, torch.ones(inner[0])]))


class Workload:
    """Networks at a resolution, and training steps with them.

    Args:
        model: sizes of the networks.
        pixels: height and width of the images.
        device: of the networks and the data.
        dtype: of UNet and VAE. The LoRA, g_φ, the reward and the states are float32, or float64 if `dtype` is.
    """

    def __init__(self, model: Model, pixels: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.pixels, self.device, self.dtype = model, pixels, device, dtype
        self.master = torch.promote_types(dtype, torch.float32)
        size = pixels // 2 ** (len(model.vae["block_out_channels"]) - 1)
        self.shape = (4, size, size)
        self.text = model.unet["cross_attention_dim"]
        self.family = SDXL if model.unet.get("addition_embed_type") == "text_time" else SD
        self.generator = torch.Generator(device).manual_seed(0)
        torch.manual_seed(0)
        self.unet, self.vae, self.flow = self._networks(device)
        self.unet.requires_grad_(False)
        self.rewards: dict[str, nn.Module] = {"small": Reward(model.reward_pixels).to(device, self.master)}
        self.conditions = self._conditions()
        for parameter in self.flow.parameters():
            parameter.data += 0.02 * self._noise(*parameter.shape)
        self.table = ddim_table(STEPS)
        self.decoders: dict[tuple[bool, bool], Decoder] = {}
        self.decodes = 0
        self.batches: dict[tuple[int, str], Transitions] = {}
        self.policies: dict[tuple, Policy] = {}

    def _networks(self, device: torch.device | str) -> tuple[nn.Module, ...]:
        with torch.device(device), default_dtype(self.dtype):
            unet = UNet2DConditionModel.from_config(self.model.unet | {"sample_size": self.shape[1]}).eval()
            vae = AutoencoderKL.from_config(self.model.vae).eval()
        with torch.device(device), default_dtype(self.master):
            return unet, vae, UNetFlow(4, self.text, self.model.flow)

    def _conditions(self) -> Conditions:
        embeddings = {
            name: self._noise(1 + PROMPTS, *shape).to(self.dtype)
            for name, shape in self._description(self.unet).embedding_shapes.items()
        }
        return Conditions(**embeddings, shared=self.family.size_input((self.pixels, self.pixels), self.dtype))

    def _description(self, unet: nn.Module) -> Description:
        lengths = dict.fromkeys(self.family.text_lengths, self.model.tokens)
        return Description(family=self.family, network=unet.config, vae=self.model.vae, lengths=lengths)

    def costs(self) -> UnitCosts:
        """Costs of the networks' passes."""
        unet, vae, flow = self._networks("meta")
        return UnitCosts(Shapes(unet, vae, flow, self.dtype, self._description(unet), self.shape), guided=True)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.master)

    def _count(self, decoder: nn.Module, arguments: tuple, images: Tensor) -> None:
        self.decodes += len(images)

    def reward(self, variant: Variant) -> nn.Module:
        """The reward of `variant`."""
        name = variant.reward
        if name not in self.rewards:
            self.rewards[name] = vision_reward(self.model.vision, name, self.device)
        return self.rewards[name]

    def decoder(self, variant: Variant) -> Decoder:
        """The decoder of `variant`; its calls are counted in `decodes`."""
        key = (variant.lean, variant.decoder_channels_last, variant.kernels)
        if key not in self.decoders:
            if variant.decoder_channels_last:  # a copy, because the layout changes in place
                backend = "auto" if variant.kernels else "torch"
                decoder = Decoder(copy.deepcopy(self.vae), self.model.decode_chunk, channels_last=True, backend=backend)
            else:
                decoder = Decoder(self.vae, self.model.decode_chunk) if variant.lean else WholeDecoder(self.vae)
            decoder.register_forward_hook(self._count)
            self.decoders[key] = decoder
        return self.decoders[key]

    def policy(self, variant: Variant) -> Policy:
        """The policy of `variant`; variants with the same settings share it."""
        xformers = variant.attention == "xformers"
        key = (variant.lora, variant.channels_last, variant.compile, xformers, variant.quantise)
        if key not in self.policies:
            unet = copy.deepcopy(self.unet)
            if variant.quantise != "none":
                quantise_linear_layers(unet, variant.quantise)
            policy = Policy(unet, self.conditions, guidance_scale=5.0, family=self.family)
            generator = torch.Generator(self.device).manual_seed(1)
            for parameter in policy.trainable():
                values = torch.randn(parameter.shape, generator=generator, device=self.device) * 0.02
                parameter.data = values.to(self.master)
            if not variant.lora:
                for module in policy.modules():
                    if isinstance(module, LoraLinear):
                        module.__class__ = PeftLinear
            attention = "sdpa" if variant.attention in FIRST else variant.attention
            policy.optimise(variant.compile, attention, variant.channels_last)
            self.policies[key] = policy
        return self.policies[key]

    def transitions(self, count: int, draw: str, size: int) -> Transitions:
        """K drawn steps of each of count / K trajectories, sampled from random states `size` at a time. Repeated calls return
        the same transitions."""
        if (count, draw) not in self.batches:
            self.batches[count, draw] = self._sampled(count, draw, size)
        return self.batches[count, draw]

    @torch.no_grad()
    def _sampled(self, count: int, draw: str, size: int) -> Transitions:
        policy = self.policy(Variant(name="sampler", lora=True))
        trajectories = count // DRAWN
        steps = DRAWS[draw](0, 0, trajectories, STEPS, DRAWN - 1).sort(1).values
        columns: list[list[Transitions]] = []
        for rows in torch.arange(trajectories).split(size):
            states, before, columns_here = None, None, []
            for column in range(DRAWN):
                step = steps[rows, column].to(self.device)
                x = self._noise(len(rows), *self.shape)
                if states is not None:
                    adjacent = step == before + 1
                    x = torch.where(adjacent.view(-1, 1, 1, 1), states, x)
                row, prompt = self.table.rows(step, x), (rows % PROMPTS).to(self.device)
                output = policy(x, row.timestep, prompt)
                states, o = PLAIN.guided_step(output, x, self._noise(*x.shape), row, guidance_scale=5.0)
                unknown = torch.full((len(rows),), float("nan"), device=self.device)
                numbers = {"trajectory": rows.to(self.device), "prompt": prompt, "reward": unknown}
                fields = {"x": x, "x_next": states, "model_output": o}
                columns_here.append(Transitions(step_index=step, **fields, **numbers))
                before = step
            columns.append(columns_here)
        parts = [part for column in zip(*columns, strict=True) for part in column]
        names = [field.name for field in dataclasses.fields(Transitions)]
        return Transitions(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def step(self, variant: Variant, count: int, size: int) -> tuple[Callable[[], Any], Transitions, Policy]:
        """A function that runs a step of `count` transitions; the transitions; and the policy."""
        policy, decoder = self.policy(variant), self.decoder(variant)
        batch = self.transitions(count, variant.draw, size)
        settings = (
            self.reward(variant),
            [""] * PROMPTS,
            self.table,
            Objective(beta=100.0, reward_gradient=variant.reward_gradient),
        )
        parameters = [*policy.trainable(), *self.flow.parameters()]
        if variant.ours:
            backend, reuse = "triton" if variant.kernels else "torch", variant.draw == "runs"
            step = BalanceStep(policy, self.flow, decoder, *settings, size, backend, reuse)
            selection = batch if variant.reverse_fraction == 1 else partly_reversed(batch, variant)
            run = lambda: step(selection)  # noqa: E731
        else:
            column = count // DRAWN
            slots = [batch[rows] for part in torch.arange(count).split(column) for rows in part.split(size)]
            flow = Mixed(self.flow, self.dtype != self.master)
            run = lambda: naive_step(policy, flow, decoder, *settings, slots)  # noqa: E731

        def whole() -> None:
            for parameter in parameters:
                parameter.grad = None
            mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=variant.autocast)
            with mixed, preferring(variant.attention):
                run()
            if variant.ours and step.micro_batch < size:
                raise torch.OutOfMemoryError(f"fits only {step.micro_batch} transitions in a micro-batch")
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return whole, batch, policy
