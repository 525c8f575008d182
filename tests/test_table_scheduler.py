"""Plain pipelines that step by a table, against diffusers' own schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from torch import Tensor

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


def test_the_last_step_s_noise_can_be_left_out(pipeline: StableDiffusionPipeline) -> None:
    table, config = TransitionTable.from_scheduler(ddim(), 6), ddim().config
    pipeline.scheduler = TableScheduler(table, config)
    noisy = images(pipeline)
    pipeline.scheduler = TableScheduler(table, config, final_noise=False)
    mean = images(pipeline)
    generator = torch.Generator().manual_seed(1)
    for _ in range(7):  # the start and six steps
        noise = torch.randn(1, 4, 8, 8, generator=generator)
    torch.testing.assert_close(noisy[:1] - mean[:1], table.sigma[-1].float() * noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", ["ddim", "flow-sde", "dance", "cps"])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 16, 64)], ids=["latents", "packed"])
def test_steps_of_flows(rows: str, shape: tuple[int, ...]) -> None:
    """x' = a x + b o + σ ε in any shape, ε from `generator` if the pipeline passes none, in bfloat16 outputs too."""
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
        torch.testing.assert_close(
            x_next, (table.a[i] * x + table.b[i] * o + table.sigma[i] * noise), rtol=1e-5, atol=1e-6
        )
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
