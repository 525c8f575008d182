"""The sampler of a run: its scheduler, its table, and plain diffusers with the same noise."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from fastnabla.config.model_sections import ModelConfig, SamplerConfig
from fastnabla.models.noise_schedule import flow_schedule, shipped_scheduler
from fastnabla.models.pipeline import encode_prompts, pipeline_of
from fastnabla.models.policy import Policy
from fastnabla.models.sampler import sampler_of, scheduler_of, use_sampler
from fastnabla.models.sampler_table import sampler_table, unused_settings
from fastnabla.table_scheduler import TableScheduler
from fastnabla.testbed import pipeline_folder
from fastnabla.trajectories.rollout import sample
from fastnabla.transition import TransitionTable
from tests.checks import STABLE_DIFFUSION, relative_error

SPACINGS = [
    ("ddim", "leading", range(951, 0, -50)),
    ("ddim", "trailing", range(999, 0, -50)),
    ("sde-dpmsolver++", "leading", range(941, 1, -47)),
    ("sde-dpmsolver++", "trailing", range(999, 0, -50)),
    ("sde-dpmsolver++", "linspace", np.linspace(999, 0, 21).round()[:-1]),
]
"""Scheduler, spacing, and the timesteps of 20 steps."""


SCHEDULE = STABLE_DIFFUSION | {"num_train_timesteps": 1000, "prediction_type": "epsilon"}
SAVED_WITH = [
    (DDIMScheduler, {"clip_sample": True, "timestep_spacing": "trailing", "thresholding": True}),
    (DDIMScheduler, {"steps_offset": 0, "set_alpha_to_one": True}),
    (DDPMScheduler, {"variance_type": "fixed_large", "clip_sample": True}),
    (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    (EulerDiscreteScheduler, {"timestep_spacing": "linspace", "use_karras_sigmas": True, "sigma_max": 80.0}),
    (EulerDiscreteScheduler, {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}),
    (EulerAncestralDiscreteScheduler, {"steps_offset": 3}),
    (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True, "lambda_min_clipped": -5.1},
    ),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_lu_lambdas": True}),
    (DPMSolverSinglestepScheduler, {"thresholding": True}),
    (DEISMultistepScheduler, {"algorithm_type": "deis"}),
    (UniPCMultistepScheduler, {"solver_type": "bh2", "predict_x0": True}),
    (LMSDiscreteScheduler, {"use_karras_sigmas": True}),
    (HeunDiscreteScheduler, {"clip_sample": True, "use_beta_sigmas": True}),
    (KDPM2DiscreteScheduler, {}),
    (LCMScheduler, {"original_inference_steps": 50}),
    (TCDScheduler, {}),
]
"""Schedulers that checkpoints of Stable Diffusion come with, and settings of each that are not the noise schedule."""
PUBLISHED = {
    "stable-diffusion-v1-5": (
        PNDMScheduler,
        STABLE_DIFFUSION
        | {"num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
        | {"trained_betas": None, "clip_sample": False},
    ),
    "stable-diffusion-xl-base-1.0": (
        EulerDiscreteScheduler,
        SCHEDULE
        | {"clip_sample": False, "interpolation_type": "linear", "sample_max_value": 1.0, "set_alpha_to_one": False}
        | {"skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None}
        | {"use_karras_sigmas": False},
    ),
}


@pytest.fixture(scope="module")
def testbed() -> DiffusionPipeline:
    return pipeline_of(ModelConfig(name="testbed", dtype="float32"))


@pytest.fixture
def pipeline(testbed: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The testbed with its own scheduler, which tests replace."""
    own = testbed.scheduler
    yield testbed
    testbed.scheduler = own


@pytest.mark.parametrize("kind", ["ddim", "sde-dpmsolver++"])
@pytest.mark.parametrize(("shipped", "settings"), SAVED_WITH, ids=lambda value: getattr(value, "__name__", ""))
def test_checkpoints_of_one_model_are_sampled_alike(
    pipeline: DiffusionPipeline, kind: str, shipped: type, settings: dict, tmp_path: Path
) -> None:
    """Whatever scheduler they were saved with: the table of the testbed's own, to the bit, and its scheduler's settings."""
    expected = use_sampler(pipeline, SamplerConfig(scheduler=kind, steps=20))
    own = dict(pipeline.scheduler.config)
    shipped.from_config(SCHEDULE | settings).save_pretrained(tmp_path)
    pipeline.scheduler = shipped.from_pretrained(tmp_path)
    table = use_sampler(pipeline, SamplerConfig(scheduler=kind, steps=20))
    for column in dataclasses.fields(table):
        assert torch.equal(getattr(table, column.name), getattr(expected, column.name)), column.name
    assert dict(pipeline.scheduler.config) == own


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"stochastic_sampling": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_flow_models_are_sampled_alike(settings: dict) -> None:
    """By the steps of a checkpoint without these settings, which --dry-run lists."""
    plain, other = (FlowMatchEulerDiscreteScheduler(shift=3.0, **more) for more in ({}, settings))
    (_, expected), (scheduler, table) = (sampler_of(shipped, SamplerConfig(steps=20)) for shipped in (plain, other))
    for column in dataclasses.fields(table):
        assert torch.equal(getattr(table, column.name), getattr(expected, column.name)), column.name
    assert unused_settings(other, scheduler, flow_schedule(other)) == settings


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0"])
def test_ordinary_checkpoints_are_sampled_with_their_own_settings(pipeline: DiffusionPipeline, name: str) -> None:
    """The scheduler_config.json of the published models: DDIM from it has the table of the run's DDIM."""
    shipped, settings = PUBLISHED[name]
    pipeline.scheduler = shipped.from_config(settings)
    expected = TransitionTable.from_scheduler(DDIMScheduler.from_config(settings), 50)
    table = use_sampler(pipeline, SamplerConfig())
    for column in dataclasses.fields(table):
        assert torch.equal(getattr(table, column.name), getattr(expected, column.name)), column.name


@pytest.mark.parametrize("kind", ["ddim", "sde-dpmsolver++"])
@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction"},
        {"num_train_timesteps": 500},
        {"trained_betas": np.linspace(1e-3, 1e-2, 1000).tolist()},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_noise_schedule_is_the_checkpoint_s(pipeline: DiffusionPipeline, kind: str, changes: dict) -> None:
    pipeline.scheduler = EulerDiscreteScheduler(**SCHEDULE | changes)
    betas = pipeline.scheduler.betas
    use_sampler(pipeline, SamplerConfig(scheduler=kind, spacing="trailing"))
    assert torch.equal(pipeline.scheduler.betas, betas)
    assert all(pipeline.scheduler.config[name] == value for name, value in changes.items())


def test_zero_terminal_snr_starts_from_pure_noise(
    pipeline: DiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """At ᾱ = 0 the first step is x' = −√ᾱ' v + √(1 − ᾱ') ε, whatever x is."""
    shipped = DDIMScheduler(**SCHEDULE | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    pipeline.scheduler = shipped
    table = use_sampler(pipeline, SamplerConfig(spacing="trailing"))
    signal = shipped.alphas_cumprod[979].double()
    assert (table.a[0], table.alpha_bar[0]) == (0, 0)
    torch.testing.assert_close(
        torch.stack([table.b[0], table.sigma[0]]), torch.stack([-(signal**0.5), (1 - signal) ** 0.5])
    )
    assert not caplog.records
    pipeline.scheduler = shipped
    use_sampler(pipeline, SamplerConfig())
    assert "Consider --sampler.spacing trailing" in caplog.text


def test_without_default_spacing_a_run_of_an_older_version_has_the_checkpoint_s(pipeline: DiffusionPipeline) -> None:
    pipeline.scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    assert use_sampler(pipeline, SamplerConfig(spacing=None)).timestep[0] == 999
    pipeline.scheduler = PNDMScheduler(
        **SCHEDULE, steps_offset=1
    )  # diffusers' default of the new scheduler, not of PNDM
    assert use_sampler(pipeline, SamplerConfig(spacing=None, scheduler="sde-dpmsolver++")).timestep[0] == 999


@pytest.mark.parametrize(
    ("shipped", "message"),
    [
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler, is not supported: it has no beta_start"),
        (EDMEulerScheduler(), "EDMEulerScheduler, is not supported: it has no beta_start"),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "DPMSolverMultistepScheduler, .* flow matching",
        ),
        (EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type = 'continuous'"),
        (DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule = 'sigmoid' must be one of linear"),
        (DDIMScheduler(prediction_type="score"), "prediction_type = 'score' must be one of epsilon"),
        (DDIMScheduler(trained_betas=[0.1] * 10), "10 trained_betas for num_train_timesteps = 1000"),
        (CogVideoXDDIMScheduler(), "CogVideoXDDIMScheduler, .* its ᾱ are not those of its betas"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedulers_of_other_kinds_of_model_are_refused(
    pipeline: DiffusionPipeline, shipped: object, message: str
) -> None:
    pipeline.scheduler = shipped
    with pytest.raises(ValueError, match=f"the checkpoint's scheduler, .*{message}"):
        use_sampler(pipeline, SamplerConfig())


def test_a_refused_scheduler_of_a_folder_is_named_with_it(tmp_path: Path) -> None:
    DDIMScheduler(**SCHEDULE, trained_betas=[0.1] * 10).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text((pipeline_folder() / "model_index.json").read_text())
    with pytest.raises(ValueError, match=f"model.name = '{tmp_path}': the checkpoint's scheduler, .* 10 trained_betas"):
        shipped_scheduler(ModelConfig(name=str(tmp_path)))


def test_the_table_says_where_every_value_is_from(tmp_path: Path) -> None:
    model = Path(shutil.copytree(pipeline_folder(), tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text()) | {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"]
    }
    (model / "model_index.json").write_text(json.dumps(index))
    shipped = EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=True, timestep_spacing="linspace")
    shipped.save_pretrained(model / "scheduler")
    config = SamplerConfig(steps=20)
    table = sampler_table(
        ModelConfig(name=str(model)), config, TransitionTable.from_scheduler(scheduler_of(shipped, config), 20)
    )
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    unused = "fastnabla; EulerDiscreteScheduler is not used to sample"
    assert ("beta_start", "0.00085", "the checkpoint's noise schedule (EulerDiscreteScheduler)") in rows
    assert ("timesteps", "951 → 901 → 851 → … → 101 → 51 → 1 → 0", "sampler.steps = 20") in rows
    assert ("timestep_spacing", "leading", "sampler.spacing") in rows
    assert ("clip_sample", "False", "fastnabla") in rows
    assert [row for row in rows if row[2] == unused] == [
        ("use_karras_sigmas", "not True", unused),
        ("timestep_spacing", "not linspace", unused),
        ("steps_offset", "not 0", unused),
    ]


@pytest.mark.parametrize(("kind", "spacing", "timesteps"), SPACINGS, ids=str)
def test_spacing_and_bound_give_the_table(
    pipeline: DiffusionPipeline, kind: str, spacing: str, timesteps: np.ndarray
) -> None:
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
            {"spacing": None},
            r"sampler\.spacing = None .*sigma\[49\] = 0.*in a run: sampler\.spacing",
        ),
        ({"timestep_spacing": "linspace"}, {"spacing": None}, r"sampler\.spacing = None .*'leading'"),
        (
            {"rescale_betas_zero_snr": True},
            {"spacing": "trailing"},
            r"sampler\.spacing = 'trailing': starts at zero terminal SNR .*Use --sampler\.spacing leading",
        ),
        ({}, {"eta": 1.2}, r"sampler\.eta = 1\.2 .*eta > 1"),
        ({}, {"steps": 1000}, r"sampler\.steps = 1000: .*1000, is beyond the last trained one"),
        ({}, {"steps": 999, "scheduler": "sde-dpmsolver++"}, r"sampler\.steps = 999: .*1000, is beyond the last"),
        (
            {},
            {"min_sigma": 0.5},
            r"sampler\.min_sigma = 0\.5: must be positive and below the largest σ of the sampler, 0\.454",
        ),
    ],
    ids=["divisor", "no offset", "linspace", "zero SNR", "eta", "ddim steps", "dpm steps", "all steps alike"],
)
def test_refuses_what_has_no_density(pipeline: DiffusionPipeline, own: dict, settings: dict, message: str) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **own)
    with pytest.raises(ValueError, match=message):
        use_sampler(pipeline, SamplerConfig(**settings))


def test_plain_diffusers_samples_alike_with_spacing_and_bound(pipeline: DiffusionPipeline) -> None:
    """A pipeline with the run's table draws the noise that the policy's sampler does; its UNet has no LoRA. To 1e-5, because
    guidance is computed in another order."""
    config = SamplerConfig(steps=4, spacing="trailing", min_sigma=0.1, guidance_scale=2.0)
    prompts, seeds, shape = ["a cat", "a dog"], [1, 2], (4, 8, 8)
    policy = Policy(copy.deepcopy(pipeline.unet), encode_prompts(pipeline, prompts), config.guidance_scale, 0, ())
    table = use_sampler(pipeline, config)
    with torch.no_grad():
        finished = sample(policy, table, torch.arange(2), seeds, shape, backend="torch")
    pipeline.scheduler = TableScheduler(table, pipeline.scheduler.config)
    plain = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    assert relative_error(plain, finished) < 1e-5
