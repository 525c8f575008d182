"""The sampler of a run: its scheduler, its table, and plain diffusers with the same noise."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from fastnabla.config.model_sections import ModelConfig, SamplerConfig
from fastnabla.models.model_config import Pipeline
from fastnabla.models.pipeline import encode_prompts, pipeline_of
from fastnabla.models.policy import Policy
from fastnabla.models.sampler import NoiseFloor, use_sampler
from fastnabla.trajectories.rollout import sample
from fastnabla.utils.seeding import TrajectoryNoise
from tests.checks import ddim, relative_error

SPACINGS = [
    ("ddim", "leading", range(951, 0, -50)),
    ("ddim", "trailing", range(999, 0, -50)),
    ("sde-dpmsolver++", "leading", range(941, 1, -47)),
    ("sde-dpmsolver++", "trailing", range(999, 0, -50)),
    ("sde-dpmsolver++", "linspace", np.linspace(999, 0, 21).round()[:-1]),
]
"""Scheduler, spacing, and the timesteps of 20 steps."""


@pytest.fixture
def pipeline() -> Pipeline:
    return pipeline_of(ModelConfig(name="testbed", dtype="float32"))


@pytest.mark.parametrize("kind", ["ddim", "sde-dpmsolver++"])
@pytest.mark.parametrize("shipped", [PNDMScheduler, EulerDiscreteScheduler])
def test_takes_the_noise_schedule_that_came_with_the_model(pipeline: Pipeline, kind: str, shipped: type) -> None:
    alphas = pipeline.scheduler.alphas_cumprod
    pipeline.scheduler = shipped.from_config(pipeline.scheduler.config)
    table = use_sampler(pipeline, SamplerConfig(scheduler=kind, steps=20))
    assert torch.equal(pipeline.scheduler.alphas_cumprod, alphas)
    assert len(table) == 20


def test_scheduler_of_another_kind_of_model_is_refused(pipeline: Pipeline) -> None:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler, is not supported"):
        use_sampler(pipeline, SamplerConfig())


@pytest.mark.parametrize(("kind", "spacing", "timesteps"), SPACINGS, ids=str)
def test_spacing_and_bound_give_the_table(pipeline: Pipeline, kind: str, spacing: str, timesteps: np.ndarray) -> None:
    """σ² = (1 − ᾱ')/(1 − ᾱ) (1 − ᾱ/ᾱ') for both schedulers, in numpy's float64 and here of betas in float32: 1e-4."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    now = np.array(timesteps, dtype=int)
    then = np.append(now[1:], 0)
    sigma = np.sqrt((1 - alphas[then]) / (1 - alphas[now]) * (1 - alphas[now] / alphas[then]))
    config = SamplerConfig(scheduler=kind, steps=20, spacing=spacing)
    table, bounded = (use_sampler(pipeline, dataclasses.replace(config, min_sigma=least)) for least in (None, 0.2))
    pipeline.scheduler.set_timesteps(20)
    assert pipeline.scheduler.timesteps.tolist() == now.tolist()
    for found, least in ((table, 0.0), (bounded, 0.2)):
        assert found.timestep.tolist() == now.tolist()
        np.testing.assert_allclose(found.sigma.numpy(), np.maximum(sigma, least), rtol=1e-4)
    assert (bounded.sigma == 0.2).sum() == (sigma < 0.2).sum() > 1
    for name in ("timestep_next", "a", "b", "c", "d", "c_next", "d_next", "alpha_bar", "alpha_bar_next"):
        assert torch.equal(getattr(bounded, name), getattr(table, name)), name


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_without_a_spacing_it_is_the_model_s(pipeline: Pipeline, spacing: str) -> None:
    pipeline.scheduler = ddim(timestep_spacing=spacing)
    table = use_sampler(pipeline, SamplerConfig(steps=10))
    assert table.timestep[0] == {"leading": 901, "trailing": 999}[spacing]


@pytest.mark.parametrize(
    ("own", "settings", "message"),
    [
        (
            {},
            {"steps": 30, "spacing": "trailing"},
            r"sampler\.spacing = 'trailing' .*sampler\.steps = 30: .*33 apart.*Set",
        ),
        (
            {"steps_offset": 0},
            {"spacing": "leading"},
            r"sampler\.spacing = 'leading' .*sigma\[49\] = 0.*steps_offset=1",
        ),
        ({"steps_offset": 0}, {}, r"sigma\[49\] = 0.0 at timestep 0.*in a run: sampler\.spacing"),
        (
            {},
            {"min_sigma": 0.5},
            r"sampler\.min_sigma = 0\.5: must be positive and below the largest σ of the sampler, 0\.454",
        ),
    ],
    ids=["not a divisor", "no offset", "the model's own", "all steps alike"],
)
def test_refuses_what_has_no_density(pipeline: Pipeline, own: dict, settings: dict, message: str) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **own)
    with pytest.raises(ValueError, match=message):
        use_sampler(pipeline, SamplerConfig(**settings))


def test_plain_diffusers_samples_alike_with_spacing_and_bound(pipeline: Pipeline) -> None:
    """The last of four steps is raised. Of the noise after its mean the policy's sampler draws σ' ε, and diffusers σ ε and
    then √(σ'² − σ²) ε'. Everything else is the same, to float32 rounding."""
    config = SamplerConfig(steps=4, spacing="trailing", min_sigma=0.1, guidance_scale=2.0)
    prompts, seeds, shape = ["a cat", "a dog"], [1, 2], (4, 8, 8)
    policy = Policy(pipeline.unet, encode_prompts(pipeline, prompts), config.guidance_scale, 0, ())
    table = use_sampler(pipeline, config)
    with torch.no_grad():
        finished = sample(policy, table, torch.arange(2), seeds, shape, backend="torch")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    plain = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=config.guidance_scale,
        eta=1.0,
        generator=generators,
        callback_on_step_end=NoiseFloor(pipeline, table, config, generators),
        output_type="latent",
    ).images

    noise = TrajectoryNoise(seeds, shape, "cpu")
    draws = [noise.draw() for _ in range(6)]  # the start, four steps, and what diffusers adds
    unbounded = use_sampler(pipeline, SamplerConfig(steps=4, spacing="trailing")).sigma
    assert (table.sigma[:-1] == unbounded[:-1]).all() and table.sigma[-1] == 0.1 > 3 * unbounded[-1]
    added = (0.1**2 - unbounded[-1] ** 2).sqrt()
    difference = (unbounded[-1] - 0.1) * draws[4] + added * draws[5]
    assert relative_error(plain - finished, difference.float()) < 1e-3


def test_without_a_bound_no_noise_is_drawn(pipeline: Pipeline) -> None:
    config, generator = SamplerConfig(steps=4), torch.Generator()
    before, latents = generator.get_state(), torch.ones(1, 4, 8, 8)
    add = NoiseFloor(pipeline, use_sampler(pipeline, config), config, [generator])
    for step in range(4):
        assert add(pipeline, step, torch.tensor(1), {"latents": latents})["latents"] is latents
    assert torch.equal(generator.get_state(), before)
