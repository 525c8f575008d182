"""Every setting in a checkpoint's configuration files is taken into account as plain diffusers does, or refused by name."""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, T5Config

from fastnabla.config.method_sections import Direct
from fastnabla.config.model_sections import LoraConfig, ModelConfig, SamplerConfig
from fastnabla.cost.planner import unit_costs
from fastnabla.methods.registry import STEPS
from fastnabla.models.build import build_networks
from fastnabla.models.description import described
from fastnabla.models.families import FLUX, SD, SD3, SDXL, Family
from fastnabla.models.known_configuration import require_known
from fastnabla.models.pipeline import pipeline_of
from fastnabla.prompts import RunPrompts
from fastnabla.rewards import reward_of
from fastnabla.trajectories.rollout import sample
from tests.families import TINY, UNETS, save_tiny
from tests.models.test_families import PROMPTS, config_of, plain_images

UNET, VAE, TEXT, TEXT_2 = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
)
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
TRANSFORMER = "transformer/config.json"
STATISTICS = {"latents_mean": [-1.6, 1.1, 0.7, -0.9], "latents_std": [8.4, 5.9, 7.1, 6.2]}

SCHEDULERS = [
    scheduler
    for name in dir(diffusers.schedulers)
    if inspect.isclass(scheduler := getattr(diffusers.schedulers, name))
    and issubclass(scheduler, SchedulerMixin)
    and {"beta_schedule", "prediction_type"} <= inspect.signature(scheduler).parameters.keys()
]
"""diffusers' schedulers of a discrete diffusion."""


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a constructor, with their defaults; None for those without one."""
    own = inspect.signature(function.__init__).parameters
    return {n: None if p.default is p.empty else p.default for n, p in own.items() if n not in ("self", "kwargs")}


@pytest.mark.parametrize(
    ("file", "family", "defaults"),
    [
        (INDEX, SD, parameters(StableDiffusionPipeline)),
        (INDEX, SDXL, parameters(StableDiffusionXLPipeline)),
        (UNET, SD, parameters(UNet2DConditionModel)),
        (VAE, SD, parameters(AutoencoderKL)),
        (TEXT, SD, CLIPTextConfig().to_dict()),
        *[(SCHEDULER, SD, parameters(scheduler)) for scheduler in SCHEDULERS],
        (INDEX, SD3, parameters(StableDiffusion3Pipeline)),
        (INDEX, FLUX, parameters(FluxPipeline)),
        (TRANSFORMER, SD3, parameters(SD3Transformer2DModel)),
        (TRANSFORMER, FLUX, parameters(FluxTransformer2DModel)),
        *[(VAE, family, parameters(AutoencoderKL)) for family in (SD3, FLUX)],
        ("text_encoder_3/config.json", SD3, T5Config().to_dict()),
        (TEXT_2, FLUX, T5Config().to_dict()),
        *[(TEXT, family, CLIPTextConfig().to_dict()) for family in (SD3, FLUX)],
        *[(SCHEDULER, family, parameters(FlowMatchEulerDiscreteScheduler)) for family in (SD3, FLUX)],
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:60] if isinstance(value, Family) else "",
)
def test_all_settings_of_the_libraries_are_known(file: str, family: Family, defaults: dict[str, Any]) -> None:
    """A new setting of diffusers or transformers must be added to the list, once its arithmetic is here. Defaults are
    supported, up to those of schedulers of flow matching."""
    assert {name for name in defaults if not name.startswith("_")} <= family.known[file].keys()
    if "snr_shift_scale" not in defaults:
        require_known("m", family.known, {file: defaults})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines, by family."""
    folder = tmp_path_factory.mktemp("models")
    for family in UNETS:
        save_tiny(family, folder)
    return folder


@pytest.fixture(scope="module", params=UNETS)
def model(request: pytest.FixtureRequest, saved: Path) -> str:
    return str(saved / request.param)


def without_weights(model: str, folder: Path, file: str, changes: Mapping[str, Any]) -> ModelConfig:
    """A copy of `model` without weights, with `changes` to `file`."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    edit(folder, file, changes)
    return ModelConfig(name=str(folder), dtype="float32")


def edit(folder: Path, file: str, changes: Mapping[str, Any]) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_configurations_of_the_families_are_known(model: str, tmp_path: Path) -> None:
    """So are those of diffusers' EMAModel, of old schedulers, and new ones that are off."""
    config = without_weights(model, tmp_path, UNET, {"power": 0.75, "a_new_setting": None})
    edit(tmp_path, SCHEDULER, {"tensor_format": "pt", "timestep_values": None, "predict_epsilon": True})
    description = described(config)
    unet, vae = description.network, description.vae
    assert unet["power"] == 0.75 and vae["_class_name"] == "AutoencoderKL"


REFUSED = [
    (UNET, {"attention_type": "gated"}, "attention_type = 'gated': .*GLIGEN.*; supported: 'default'"),
    (UNET, {"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": 16}, "encoder_hid_dim_type = 'ip_image_proj': .*im"),
    (UNET, {"addition_embed_type": "text_image"}, "addition_embed_type = 'text_image'"),
    (UNET, {"dual_cross_attention": True}, "dual_cross_attention = True"),
    (UNET, {"class_embeddings_concat": True}, "class_embeddings_concat = True"),
    (UNET, {"num_attention_heads": 8}, "num_attention_heads = 8"),
    (UNET, {"act_fn": "swiglu"}, "act_fn = 'swiglu'"),
    (UNET, {"a_new_setting": False}, "a_new_setting = False is unknown and would be ignored"),
    (UNET, {"quantization_config": {"load_in_4bit": True}}, "quantization_config = .* is unknown"),
    (VAE, {"shift_factor": 0.1159}, r"shift_factor = 0\.1159"),
    (VAE, {"act_fn": "relu"}, "act_fn = 'relu'"),
    (VAE, {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types = .*AttnUpDecoderBlock2D"),
    (VAE, {"latents_mean": [0.0, 0.0]}, r"latents_mean = \[0\.0, 0\.0\]: must have .* latent_channels = 4"),
    (VAE, {"latents_std": [2.0] * 4}, "latents_std without latents_mean"),
    (VAE, {"bn_eps": 1e-4}, "bn_eps = 0.0001 is unknown"),
    (TEXT, {"hidden_act": "quick_silu"}, "hidden_act = 'quick_silu'"),
    (TEXT, {"rope_scaling": {"factor": 2.0}}, "rope_scaling = .* is unknown"),
    (SCHEDULER, {"snr_shift_scale": 3.0}, r"snr_shift_scale = 3\.0"),
    (SCHEDULER, {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
    (SCHEDULER, {"sigma_data": 0.5}, r"sigma_data = 0\.5: .*EDM"),
    (SCHEDULER, {"predict_epsilon": False}, "predict_epsilon = False: .*prediction_type = 'sample'"),
    (SCHEDULER, {"beta_start": None}, "beta_start = None: must be the number"),
    (SCHEDULER, {"beta_schedule": None}, "beta_schedule = None: must be the name"),
    (SCHEDULER, {"num_train_timesteps": "1000"}, "num_train_timesteps = '1000': must be the integer"),
    (SCHEDULER, {"a_new_setting": 1}, "a_new_setting = 1 is unknown"),
    (INDEX, {"requires_aesthetics_score": True}, "requires_aesthetics_score = True: .*refiner"),
    (INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet = .* is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "changes", "message"), REFUSED, ids=[str(list(changes)) for _, changes, _ in REFUSED])
def test_refused_by_name_before_weights_are_loaded(
    model: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = without_weights(model, tmp_path, file, changes)
    with pytest.raises(ValueError, match=rf"(?s)model\.name = '.*{file}: {message}.*Use another checkpoint"):
        described(config)


def test_all_are_named_at_once() -> None:
    files = {UNET: {"new": 1, "attention_type": "gated"}, VAE: STATISTICS, TEXT_2: {"hidden_act": "selu", "old": True}}
    with pytest.raises(
        ValueError, match=r"'m': \(1\).*new = 1.*\(2\).*attention_type.*\(3\).*mean.*\(4\).*std.*\(5\).*old"
    ):
        require_known("m", SD.known | {TEXT_2: SD.known[TEXT]}, files)
    del files[UNET], files[TEXT_2]
    require_known("m", SDXL.known, files)


def changed(saved: Path, family: str, changes: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """A copy of a `saved` pipeline with `changes` by file. The networks are built with those that they take."""
    built = Path(shutil.copytree(saved / family, folder / family))
    for file, (part, library) in {UNET: ("unet", UNet2DConditionModel), VAE: ("vae", AutoencoderKL)}.items():
        own = {name: value for name, value in changes.get(file, {}).items() if name in parameters(library)}
        if own:
            torch.manual_seed(1)
            library(**getattr(TINY[family], "network" if part == "unet" else part) | own).save_pretrained(built / part)
    for file, values in changes.items():
        edit(built, file, values)
    return str(built)


def largest_difference(model: str) -> float:
    """Between our images of the pretrained policy and plain diffusers'. More steps or guidance would magnify the rounding."""
    sampler, lora = SamplerConfig(steps=2, guidance_scale=2.0), LoraConfig(targets=("conv_in",))
    config = config_of(model, sampler=sampler, lora=lora)
    prompts = RunPrompts(texts=PROMPTS, trained=2, evaluated=range(2))
    networks = build_networks(pipeline_of(config.model), prompts, config, torch.device("cpu"))
    with networks.policy.pretrained_weights():
        latents = sample(
            networks.policy, networks.table, torch.arange(2), [1, 2], networks.sample_shape, backend="torch"
        )
    plain = plain_images(DiffusionPipeline.from_pretrained(model, dtype=torch.float32), config)
    return (networks.decoder.decode(latents) - plain).abs().max().item()


ALIKE: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        UNET: {
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "encoder_hid_dim_type": "text_proj",
            "encoder_hid_dim": 16,
            "cross_attention_dim": 12,
        },
        VAE: {"use_quant_conv": False, "use_post_quant_conv": False},
        TEXT: {"hidden_act": "gelu", "use_attention_mask": True},
        SCHEDULER: {"trained_betas": torch.linspace(1e-4, 0.01, 1000).tolist(), "prediction_type": "v_prediction"},
    },
    "sdxl": {
        UNET: {"time_cond_proj_dim": 6},
        VAE: STATISTICS | {"scaling_factor": 0.5},
        SCHEDULER: {"rescale_betas_zero_snr": True},
        INDEX: {"force_zeros_for_empty_prompt": False},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(ALIKE))
def test_samples_as_plain_diffusers(family: str, saved: Path, tmp_path: Path) -> None:
    assert largest_difference(changed(saved, family, ALIKE[family], tmp_path)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 7])
def test_distilled_guidance_is_an_input(size: int, saved: Path, tmp_path: Path) -> None:
    """Of an even and an odd width. The UNet runs the conditional rows alone, and the costs are those of one row."""
    model = changed(saved, "sd15", {UNET: {"time_cond_proj_dim": size}}, tmp_path)
    assert largest_difference(model) < 1e-5
    config = config_of(model)
    prompts = RunPrompts(texts=PROMPTS, trained=2, evaluated=range(2))
    networks = build_networks(pipeline_of(config.model), prompts, config, torch.device("cpu"))
    policy = networks.policy
    unguided = dataclasses.replace(config, method="refl", direct=Direct(guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"direct\.guidance_scale = 1\.0: .* distilled .* leave it None"):
        STEPS["refl"].build(unguided, networks, reward_of(config.reward, False, torch.device("cpu")), PROMPTS)
    x, one = torch.randn(2, 4, 8, 8), torch.ones(2, dtype=torch.int64)
    before = policy(x, one, torch.arange(2))
    assert before.shape == x.shape and not unit_costs(config).guided
    policy.conditions.timestep_cond.zero_()
    assert (policy(x, one, torch.arange(2)) - before).abs().max() > 1e-3


POOL: list[tuple[str, dict[str, Any]]] = [
    *[(UNET, values) for values in (
        {"time_cond_proj_dim": 6}, {"center_input_sample": True}, {"freq_shift": 1}, {"flip_sin_to_cos": False},
        {"attention_type": "gated"}, {"only_cross_attention": True}, {"upcast_attention": True}, {"dropout": 0.5},
        {"resnet_time_scale_shift": "scale_shift"}, {"resnet_out_scale_factor": 2.0}, {"mid_block_scale_factor": 2.0},
        {"time_embedding_type": "fourier"}, {"time_embedding_act_fn": "silu"}, {"timestep_post_act": "silu"},
        {"conv_in_kernel": 5}, {"layers_per_block": [1, 2]}, {"act_fn": "gelu"}, {"dual_cross_attention": True},
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": None, "cross_attention_dim": 12},
        {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}, {"mid_block_type": "UNetMidBlock2D"},
        {"some_new_option": 1},
    )],
    *[(VAE, values) for values in (
        STATISTICS, {"latents_mean": [1.0] * 4}, {"scaling_factor": 0.5}, {"shift_factor": 0.3}, {"act_fn": "relu"},
        {"use_post_quant_conv": False, "use_quant_conv": False}, {"mid_block_add_attention": False}, {"sample_size": 8},
        {"force_upcast": False}, {"layers_per_block": 2}, {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
        {"some_new_option": 1},
    )],
    *[(TEXT, values) for values in (
        {"hidden_act": "relu"}, {"hidden_act": "quick_silu"}, {"layer_norm_eps": 0.01}, {"attention_dropout": 0.5},
        {"use_attention_mask": True}, {"some_new_option": 1},
    )],
    *[(SCHEDULER, values) for values in (
        {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_end": 0.02},
        {"trained_betas": torch.linspace(1e-4, 0.01, 1000).tolist()}, {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"}, {"rescale_betas_zero_snr": True}, {"snr_shift_scale": 3.0}, {"some_new_option": 1},
    )],
    (INDEX, {"force_zeros_for_empty_prompt": False}), (INDEX, {"requires_aesthetics_score": True}),
]  # fmt: skip
"""Settings to draw from, by file. `encoder_hid_dim` None stands for the width of the text."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@settings(max_examples=6)
@given(drawn=st.lists(st.sampled_from(POOL), min_size=1, max_size=3))
def test_samples_as_plain_diffusers_or_is_refused(
    family: str, drawn: list[tuple[str, dict[str, Any]]], saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changes: dict[str, dict[str, Any]] = {}
    for file, values in drawn:
        changes[file] = changes.get(file, {}) | values
    unet = changes.get(UNET, {})
    if unet.get("encoder_hid_dim_type") == "text_proj":
        unet["encoder_hid_dim"] = TINY[family].network["cross_attention_dim"]
    model = changed(saved, family, changes, tmp_path_factory.mktemp("drawn"))
    try:
        difference = largest_difference(model)
    except ValueError as error:
        assert "model.name = " in str(error)
        assert any(f"{file}: {name}" in str(error) for file, values in changes.items() for name in values)
    else:
        # Of x̂₀ at the last step, diffusers computes ε̂ with 1 − ᾱ = 9e-4 rounded to float32.
        predicts_sample = changes.get(SCHEDULER, {}).get("prediction_type") == "sample"
        assert difference < (2e-5 if predicts_sample else 1e-5), changes
