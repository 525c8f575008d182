"""Plain pipelines that step by a table, against diffusers' own schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from torch import Tensor

from fastnabla.flow_matching_coefficients import dynamic_shift
from fastnabla.table_scheduler import TableScheduler
from fastnabla.testbed import pipeline_folder
from fastnabla.transition import TransitionTable
from tests.checks import STABLE_DIFFUSION, ddim, flow_table, randn, relative_error

DPM = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "final_sigmas_type": "sigma_min"}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: StableDiffusionPipeline, **settings: object) -> Tensor:
    """Latents of two prompts, each with a generator of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    settings = {
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "generator": generators,
        "output_type": "latent",
        **settings,
    }
    return pipeline(["a cat", "a dog"], **settings).images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (ddim(), 1.0),
        (ddim(timestep_spacing="trailing"), 0.4),
        (DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **DPM), 1.0),
    ],
    ids=["ddpm", "ddim", "dpm"],
)
def test_samples_of_diffusers_schedulers(pipeline: StableDiffusionPipeline, scheduler, eta: float) -> None:
    """The same noise from the same generators; diffusers' float32 coefficients differ by 1e-5 (tests/test_transition.py), which
    five steps of the UNet enlarge."""
    steps = 5 if scheduler.config.timestep_spacing == "trailing" else 6  # trailing DDIM needs a divisor of 1000
    pipeline.scheduler = scheduler
    expected = images(pipeline, eta=eta, num_inference_steps=steps)
    table = TransitionTable.from_scheduler(scheduler, steps, eta)
    pipeline.scheduler = TableScheduler(table, scheduler.config)
    assert relative_error(images(pipeline, num_inference_steps=steps), expected) < 1e-4


@pytest.mark.parametrize("rows", ["ddim", "flow-sde", "dance", "cps"])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 16, 64)], ids=["latents", "packed"])
def test_steps_of_flows(rows: str, shape: tuple[int, ...]) -> None:
    """x' = a x + b o + σ ε in any shape, ε from `generator` if the pipeline passes none, in bfloat16 outputs too. The last step of
    "ddim" and "cps" is x̂0."""
    table = flow_table(6, 0.6, rows=rows)
    scheduler = TableScheduler(table, FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    scheduler.set_timesteps(6)
    scheduler.generator = torch.Generator().manual_seed(5)
    assert torch.equal(scheduler.timesteps, table.timestep)
    x, o = randn(*shape), randn(*shape, seed=1)
    for i, timestep in enumerate(scheduler.timesteps):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        scheduler.generator.manual_seed(5)
        (x_next,) = scheduler.step(o, timestep, x, return_dict=False)
        expected = table.a[i] * x + table.b[i] * o + table.sigma[i] * noise
        if i == 5 and rows in ("ddim", "cps"):
            expected = x + table.d[i] * o
        torch.testing.assert_close(x_next, expected, rtol=1e-5, atol=1e-6)
        own = scheduler.step(o, timestep, x, generator=torch.Generator().manual_seed(5)).prev_sample
        assert torch.equal(own, x_next)
    assert scheduler.step(o.bfloat16(), timestep, x.bfloat16()).prev_sample.dtype == torch.bfloat16


def test_noise_is_torch_s_without_a_generator() -> None:
    scheduler, x = TableScheduler(flow_table(6), {}), randn(1, 4, 8, 8)
    torch.manual_seed(3)
    first = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    torch.manual_seed(3)
    assert torch.equal(scheduler.step(x, 1000.0, x).prev_sample, first)
    assert not torch.equal(scheduler.step(x, 1000, x).prev_sample, first)


def test_pipelines_of_flows_set_its_timesteps() -> None:
    """As SD3 does (the number of steps), and FLUX (sigmas before the shift, and mu of the image size, which a scheduler without
    dynamic shifting ignores)."""
    levels = np.linspace(1.0, 1 / 6, 6)
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = TableScheduler(TransitionTable.from_scheduler(static, 6), static.config)
    timesteps, count = retrieve_timesteps(scheduler, 6, "cpu")
    assert count == 6 and torch.equal(timesteps, scheduler.table.timestep)
    retrieve_timesteps(scheduler, 6, "cpu", sigmas=levels, mu=0.7)

    own = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    scheduler = TableScheduler(TransitionTable.from_scheduler(own, 6, mu=0.7), own.config)
    assert scheduler.config.get("base_image_seq_len") == 256 and scheduler.config.num_train_timesteps == 1000
    for sigmas in (levels, None):
        own.set_timesteps(sigmas=levels, mu=0.7)
        timesteps, _ = retrieve_timesteps(
            scheduler, None if sigmas is not None else 6, "cpu", sigmas=sigmas, mu=0.7 + 1e-9
        )
        torch.testing.assert_close(timesteps, own.timesteps)


FLOW = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
WRONG = {
    "steps": ({"num_inference_steps": 7}, "num_inference_steps: 7 steps, but the scheduler's table has 6; pass num_inference_steps=6"),
    "number of sigmas": ({"sigmas": [1.0, 0.5], "mu": 0.7}, "sigmas: 2 steps, but"),
    "number of timesteps": ({"timesteps": [1000.0]}, "timesteps: 1 steps, but"),
    "mu": ({"sigmas": np.linspace(1, 1 / 6, 6), "mu": 0.9}, r"sigmas and mu = 0\.9: the timesteps 1000 to .* are not those"),
    "sigmas": ({"sigmas": np.linspace(1, 0.2, 6), "mu": 0.7}, r"sigmas and mu = 0\.7: .*Build the table with"),
    "timesteps": ({"timesteps": [1000.0, 800, 600, 400, 200, 100]}, "timesteps: the timesteps 1000 to 100 are not those"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_refuses_other_noise_levels(arguments: dict, message: str) -> None:
    scheduler = TableScheduler(TransitionTable.from_scheduler(FLOW, 6, mu=0.7), FLOW.config)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)


def test_refuses_sigmas_of_other_diffusions() -> None:
    scheduler = TableScheduler(TransitionTable.from_scheduler(ddim(), 6), DDIMScheduler().config)
    with pytest.raises(ValueError, match="sigmas: the scheduler's table has its own noise levels; leave sigmas out"):
        scheduler.set_timesteps(sigmas=[1.0] * 6)
    with pytest.raises(ValueError, match="timestep 3 is not one of the sampler's 6"):
        scheduler.step(torch.ones(1, 2), 3, torch.ones(1, 2))


def test_is_not_saved(pipeline: StableDiffusionPipeline, tmp_path) -> None:
    pipeline.scheduler = TableScheduler(flow_table(6), pipeline.scheduler.config)
    with pytest.raises(ValueError, match="cannot be saved; give the pipeline its own scheduler back"):
        pipeline.save_pretrained(tmp_path / "pipeline")
    assert math.isclose(pipeline.scheduler.init_noise_sigma, 1)


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def noise_of(seeds: tuple[int, ...], shape: tuple[int, ...], draws: int) -> Tensor:
    """What a generator of each sample draws, `[draws, N, …]`."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.cat([torch.randn(1, *shape, generator=g) for g in generators]) for _ in range(draws)])


@torch.no_grad()
def test_stable_diffusion_3_samples_by_the_table() -> None:
    """A tiny random transformer, stepped here by the formula, with one generator for each sample."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    text = dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=own, vae=tiny_vae(), **text)
    pipeline.set_progress_bar_config(disable=True)
    table = TransitionTable.from_scheduler(own, 4)
    pipeline.scheduler = TableScheduler(table, own.config)
    pipeline.scheduler.generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    prompts, pooled = randn(4, 5, 16), randn(4, 16, seed=1)  # unconditional rows first
    found = pipeline(
        negative_prompt_embeds=prompts[:2],
        prompt_embeds=prompts[2:],
        negative_pooled_prompt_embeds=pooled[:2],
        pooled_prompt_embeds=pooled[2:],
        num_inference_steps=4,
        guidance_scale=2.0,
        height=16,
        width=16,
        generator=pipeline.scheduler.generator,
        output_type="latent",
    ).images

    x, *noise = noise_of((1, 2), (4, 8, 8), 5)
    for i in range(4):
        u, c = transformer(
            torch.cat([x, x]),
            timestep=table.timestep[i].expand(4),
            encoder_hidden_states=prompts,
            pooled_projections=pooled,
        ).sample.chunk(2)
        x = table.a[i] * x + table.b[i] * (2 * c - u) + (i < 3) * table.sigma[i] * noise[i]
    assert relative_error(found, x) < 1e-5


@torch.no_grad()
def test_flux_samples_by_the_table() -> None:
    """Packed latents, guidance as an argument of the network, t for its time, and the mu of the image's size."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    own = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    text = dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2"))
    pipeline = FluxPipeline(transformer=transformer, scheduler=own, vae=tiny_vae(), **text)
    pipeline.set_progress_bar_config(disable=True)
    table = TransitionTable.from_scheduler(own, 4, 0.7, rows="flow-sde", mu=dynamic_shift(16, own.config))
    pipeline.scheduler = TableScheduler(table, own.config)
    pipeline.scheduler.generator = torch.Generator().manual_seed(1)
    settings = {
        "prompt_embeds": randn(2, 5, 16),
        "pooled_prompt_embeds": randn(2, 16, seed=1),
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "latents": randn(2, 16, 16, seed=2),
        "output_type": "latent",
    }
    found = pipeline(height=16, width=16, **settings).images

    generator, x = torch.Generator().manual_seed(1), settings["latents"]
    places = pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    for i in range(4):
        o = transformer(
            x,
            timestep=table.timestep[i].expand(2) / 1000,
            guidance=torch.full((2,), 3.5),
            encoder_hidden_states=settings["prompt_embeds"],
            pooled_projections=settings["pooled_prompt_embeds"],
            txt_ids=torch.zeros(5, 3),
            img_ids=places,
        ).sample
        x = table.a[i] * x + table.b[i] * o + table.sigma[i] * torch.randn(2, 16, 16, generator=generator)
    assert relative_error(found, x) < 1e-5
    with pytest.raises(ValueError, match=r"sigmas and mu = 0\.\d+: the timesteps .* this image size's mu"):
        pipeline(height=64, width=64, **settings | {"latents": randn(2, 256, 16)})
