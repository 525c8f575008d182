"""Training steps of SD3, SD3.5 and FLUX, in float64, against the definition with diffusers' own transformers.

For the definition the LoRA is merged into the weights of the plain transformer, which is called as diffusers' pipelines do. Guidance and
DDPM's rows for flows are written out.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch._dynamo.utils import counters

from fastnabla.config.model_sections import SamplerConfig
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.reference_target import ReferenceTargetStep
from fastnabla.models.conditions import Conditions
from fastnabla.models.decoder import Decoder
from fastnabla.models.flow import ConvFlow
from fastnabla.models.pipeline import family_of_pipeline
from fastnabla.models.policy import Policy
from fastnabla.models.random_init import random_pipeline
from fastnabla.models.sampler import use_sampler
from fastnabla.objective.settings import Objective
from fastnabla.trajectories.transitions import Transitions
from fastnabla.transition import TransitionTable
from tests.checks import compiling_anew, randn, relative_error
from tests.exact import Exact
from tests.families import FLOW_MODELS, TINY

STEPS, GUIDANCE, TOKENS, SHAPE = 4, 3.5, 5, (16, 8, 12)
TOLERANCE = 1e-8
"""Relative, of each tensor. Errors are 1e-14, or up to 3e-10 where diffusers computes in float32 within a float64 network: RMSNorm in
SD3.5, rotary embeddings in FLUX."""
LORA = ("to_q", "to_k", "to_v", "to_out.0", "proj_out")
randn64 = functools.partial(randn, dtype=torch.float64)


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How near to a grey, which depends on the prompt."""
    grey = images.new_tensor([float(prompt) for prompt in prompts])
    return -(images - grey.view(-1, 1, 1, 1)).square().mean((1, 2, 3))


def ddpm_rows(t: Tensor, timestep: Tensor) -> TransitionTable:
    """DDPM's steps between the noise levels `t [T + 1]` float64, of which the last is 0. `timestep [T]` is the scheduler's."""
    t, s = t[:-1], t[1:]
    sigma = s * (1 - s**2 * (1 - t) ** 2 / (t**2 * (1 - s) ** 2)).sqrt()
    r = (s**2 - sigma**2).clamp(min=0).sqrt()
    a, b = (1 - s) + r, -t * (1 - s) + (1 - t) * r
    a[-1], b[-1], sigma[-1] = 1, -t[-1], min(0.02, t[-1].item())
    ones = torch.ones_like(t)
    return TransitionTable(
        **{"timestep": timestep, "timestep_next": torch.cat([timestep[1:], torch.zeros(1)])},
        **{"a": a, "b": b, "sigma": sigma, "c": ones, "d": -t, "c_next": ones, "d_next": -s},
        **{"alpha_bar": (1 - t) ** 2, "alpha_bar_next": (1 - s) ** 2, "noise_std": t, "noise_std_next": s},
    )


def own_table(pipeline: DiffusionPipeline) -> TransitionTable:
    """By the noise levels of the pipeline's scheduler, set as the pipeline does."""
    scheduler, tokens = copy.deepcopy(pipeline.scheduler), SHAPE[1] * SHAPE[2] // 4
    shift = {"mu": calculate_shift(tokens, 256, 4096, 0.5, 1.15)} if isinstance(pipeline, FluxPipeline) else {}
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), **shift)
    return ddpm_rows(scheduler.sigmas.double(), scheduler.timesteps)


class PlainDiffusers(Exact):
    """The definition, by the transformer and the VAE of a plain pipeline."""

    def __init__(self, pipeline: DiffusionPipeline, step: BalanceStep, transitions: Transitions) -> None:
        self.pipeline, self.table, self.transitions = pipeline, own_table(pipeline), transitions
        self.flow, self.vae, self.reward_network = step.flow, pipeline.vae, reward
        conditions = step.policy.conditions
        self.text, self.pooled = conditions.text, conditions.pooled
        self.lora = {name: value.detach().clone().requires_grad_() for name, value in step.policy.trained().items()}

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [*self.lora.values(), *self.flow.parameters()], materialize_grads=True))

    def weights(self) -> dict[str, Tensor]:
        """Those that the LoRA changes: W + B A."""
        merged = {}
        for name, up in self.lora.items():
            layer, _, factor = name.partition(".lora_")
            if factor.startswith("B"):
                down = self.lora[name.replace("lora_B", "lora_A")]
                merged[f"{layer}.weight"] = self.pipeline.transformer.get_parameter(f"{layer}.weight") + up @ down
        return merged

    def network(self, weights: dict[str, Tensor], **arguments: Tensor) -> Tensor:
        return torch.func.functional_call(
            self.pipeline.transformer, weights, kwargs={**arguments, "return_dict": False}
        )[0]

    def output(self, x: Tensor, i: int, prompt: Tensor, after: bool = False, reference: bool = False) -> Tensor:
        weights, t = {} if reference else self.weights(), self.at("timestep_next" if after else "timestep", i)[None]

        def condition(row: Tensor) -> dict[str, Tensor]:
            return {"encoder_hidden_states": self.text[row], "pooled_projections": self.pooled[row]}

        if not isinstance(self.pipeline, FluxPipeline):
            nothing, given = (
                self.network(weights, hidden_states=x, timestep=t, **condition(row)) for row in (0 * prompt, 1 + prompt)
            )
            return nothing + GUIDANCE * (given - nothing)
        channels, height, width = SHAPE
        velocity = self.network(
            weights,
            hidden_states=FluxPipeline._pack_latents(x, 1, channels, height, width),
            timestep=t / 1000,
            guidance=torch.tensor([GUIDANCE], dtype=x.dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, x.device, x.dtype),
            txt_ids=x.new_zeros(TOKENS, 3),
            **condition(1 + prompt),
        )
        return FluxPipeline._unpack_latents(velocity, height, width, vae_scale_factor=1)

    def flow_at(self, x: Tensor, i: int, prompt: Tensor, after: bool = False) -> Tensor:
        return self.flow(x, self.at("timestep_next" if after else "timestep", i)[None], self.text[1 + prompt])


def transitions_of(table: TransitionTable) -> Transitions:
    """All of two trajectories, with other states and outputs for each."""
    step = torch.arange(STEPS).repeat(2)
    x, output, noise = (randn64(2 * STEPS, *SHAPE, seed=seed) for seed in range(3))
    rows, trajectory = table.rows(step, x), torch.arange(2).repeat_interleave(STEPS)
    return Transitions(
        x=x,
        x_next=rows.a * x + rows.b * output + rows.sigma * noise,
        model_output=output,
        step_index=step,
        prompt=trajectory,
        trajectory=trajectory,
        reward=torch.zeros(2 * STEPS, dtype=torch.float64),
    )


@functools.cache
def pipeline_of(model: str) -> DiffusionPipeline:
    pipeline = random_pipeline(TINY[model], {"default": torch.float64})
    for network in (pipeline.transformer, pipeline.vae):
        network.requires_grad_(False).eval()
    return pipeline


def step_of(pipeline: DiffusionPipeline, objective: Objective) -> BalanceStep:
    network, family = copy.deepcopy(pipeline.transformer), family_of_pipeline(pipeline)
    width, pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim
    conditions = Conditions(randn64(3, TOKENS, width, seed=10), randn64(3, pooled, seed=11))
    policy = Policy(network, conditions, GUIDANCE, 2, LORA, family).double()
    for seed, parameter in enumerate(policy.trainable()):
        parameter.data = 0.1 * randn64(*parameter.shape, seed=seed)
    torch.manual_seed(0)
    flow = ConvFlow(SHAPE[0], width, 8).double()
    flow.last.reset_parameters()
    table = use_sampler(
        SimpleNamespace(scheduler=pipeline.scheduler),
        SamplerConfig(steps=STEPS),
        family.tokens(network.config, *SHAPE[1:]),
    )
    step = ReferenceTargetStep if objective.reverse_target == "reference" else BalanceStep
    return step(policy, flow, Decoder(pipeline.vae), reward, ["0", "1"], table, objective, 3, backend="torch")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"reward_gradient": "terminal"}, {"reward_gradient": "lookahead"}, {"reverse_target": "reference"}],
    ids=lambda settings: next(iter(settings.values())),
)
@pytest.mark.parametrize("model", FLOW_MODELS)
def test_gradients(model: str, settings: dict[str, str]) -> None:
    """Of residual ∇-DB, to the LoRA and to the flow network. The reward's share of the residuals is as large as the others."""
    objective = Objective(beta=1e6, weighting="sigma", trust_region_weight=1.0, **settings)
    step = step_of(pipeline_of(model), objective)
    transitions = transitions_of(step.table)
    step(transitions)

    exact = PlainDiffusers(pipeline_of(model), step, transitions)
    follows = objective.reverse_target == "reference"
    expected = exact.gradients(exact.reference_target_loss(objective) if follows else exact.balance_loss(objective))
    assert (step.policy.guidance_scale is None) == (model == "flux") and len(expected) == len(step.parameters)
    for parameter, gradient in zip(step.parameters, expected, strict=True):
        assert gradient.norm() > 0 and relative_error(parameter.grad, gradient) < TOLERANCE


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with compiling_anew(monkeypatch):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "compile", "checkpoint"),
    [("sd35", "blocks", False), ("sd35", "whole", True), ("flux", "blocks", True), ("flux", "whole", False)],
)
def test_compiled_transformers_have_the_same_gradients(
    model: str, compile: str, checkpoint: bool, compiler: None
) -> None:
    found = []
    for optimise in (False, True):
        step = step_of(pipeline_of(model), Objective(beta=1e6, weighting="sigma", reward_gradient="lookahead"))
        if optimise:
            step.policy.optimise(compile, checkpoint=checkpoint)
        step(transitions_of(step.table))
        found.append([parameter.grad for parameter in step.parameters])
    assert counters["stats"]["unique_graphs"] > 0
    for plain, compiled in zip(*found, strict=True):
        assert plain.norm() > 0 and relative_error(compiled, plain) < TOLERANCE
