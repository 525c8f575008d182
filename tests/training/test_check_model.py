"""A run that its model does not fit is refused by name, from the model's configuration files alone."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from fastnabla import train
from fastnabla.config.model_sections import ModelConfig, RewardConfig
from fastnabla.training import build, command
from fastnabla.training.check_model import check_model
from fastnabla.training.trainer import Trainer
from tests.families import FLOW_MODELS, save_tiny
from tests.models.test_fitting import changed
from tests.runs import small

RENORMALISES = "its guidance renormalises the output"
NO_T5 = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
STATISTICS = {"vae.latents_mean": [0.0] * 16, "vae.latents_std": [1.0] * 16}
FILES: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        name: ("sd3", {"_class_name": name}, f"it is a {name}, which is not supported because {why}.*; supported are Stable")
        for name, why in {
            "QwenImagePipeline": f"{RENORMALISES}.*, and its VAE has statistics of each channel",
            "Lumina2Pipeline": RENORMALISES,
            "SanaPipeline": "its VAE is an AutoencoderDC, whose gradient is not implemented",
            "Flux2Pipeline": "its VAE normalises patches by statistics of each channel",
        }.items()
    },
    "another VAE": ("flux", {"vae": ["diffusers", "AutoencoderKLFlux2"]}, "vae = AutoencoderKLFlux2: must be AutoencoderKL"),
    "statistics": ("sd3", STATISTICS, r"latents_mean = .*do not decode with statistics of each channel.*Use another checkpoint"),
    "no T5": ("sd3", NO_T5, "has no text_encoder_3, tokenizer_3: finetuning needs transformer, .*; use a checkpoint that has all"),
    "Heun": (
        "flux",
        {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]},
        "FlowMatchHeunDiscreteScheduler, is not supported: it has no beta_start.*give a copy with FlowMatchEulerDiscreteScheduler",
    ),
    "a diffusion's": ("sd3", {"scheduler.beta_start": 0.1}, r"beta_start = 0\.1 is unknown and would be ignored.*Use another"),
    "a flow's": ("sd15", {"scheduler.shift": 3.0}, r"shift = 3\.0 is unknown and would be ignored.*Use another"),
    "inverted": ("sd3", {"scheduler.invert_sigmas": True}, "invert_sigmas = True: .*noise levels would rise; supported: False"),
}  # fmt: skip
NO_GUIDANCE = {"transformer.guidance_embeds": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines without their weights, by family."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("sd15", *FLOW_MODELS):
        save_tiny(family, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def check(model: ModelConfig, method: str = "residual-db", **sampler: Any) -> None:
    sampler_config = dataclasses.replace(small().sampler, **sampler)
    check_model(small(model=model, method=method, sampler=sampler_config, reward=RewardConfig(terms=("hue=1",))))


def refused(message: str, model: ModelConfig, *arguments: Any, **settings: Any) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check(model, *arguments, **settings)


@pytest.mark.parametrize("family", ["sd15", *FLOW_MODELS])
def test_models_that_fit(family: str, folders: Path) -> None:
    check(ModelConfig(name=str(folders / family), dtype="float32"))


@pytest.mark.parametrize(("family", "changes", "message"), FILES.values(), ids=FILES)
def test_files(family: str, changes: dict[str, Any], message: str, folders: Path, tmp_path: Path) -> None:
    model = changed(folders, family, tmp_path, changes)
    refused(message if "is not supported: it has" in message else rf"model\.name = .*{message}", model)


def test_guidance_of_a_model_without_it(folders: Path, tmp_path: Path) -> None:
    """As FLUX.1-schnell."""
    schnell = changed(folders, "flux", tmp_path, NO_GUIDANCE)
    check(schnell, guidance_scale=1.0)
    message = r"sampler\.guidance_scale = 3\.5: this FLUX takes no guidance .*use --sampler\.guidance-scale 1\."
    refused(message, schnell, guidance_scale=3.5)


@pytest.mark.parametrize(
    ("family", "scheduler", "message"),
    [
        ("sd3", "sde-dpmsolver++", "the model is a flow model; use ddim, flow-sde, dance, cps"),
        ("sd15", "flow-sde", r"the model is a diffusion model; use ddim, sde-dpmsolver\+\+"),
    ],
)
def test_samplers(family: str, scheduler: str, message: str, folders: Path) -> None:
    model = ModelConfig(name=str(folders / family), dtype="float32")
    refused(rf"sampler\.scheduler = '{re.escape(scheduler)}': {message}", model, scheduler=scheduler)


@pytest.mark.parametrize(
    ("name", "sides", "message"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", {"height": 1000}, "must be a multiple of 16; .* 992 and 1008"),
        ("black-forest-labs/FLUX.1-dev", {"width": 1000}, "must be a multiple of 16; .* 992 and 1008"),
        ("stabilityai/stable-diffusion-3-medium-diffusers", {"height": 3088}, "position embeddings up to 3072 pixels; use at"),
    ],
)  # fmt: skip
def test_sizes(name: str, sides: dict[str, int], message: str) -> None:
    """Multiples of the VAE's 8 pixels times the patch of 2 latents."""
    side, value = next(iter(sides.items()))
    refused(rf"model\.{side} = {value}: .*{message}", ModelConfig(name=name, random_init=True, **sides))


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("method", ["db", "dag", "dag-kl"])
def test_methods_that_reverse_the_noising_do_not_have_the_last_step_of_flows(
    method: str, family: str, folders: Path
) -> None:
    message = f"method = '{method}': the sampler ends at the clean sample.*use --method residual-db"
    refused(message, ModelConfig(name=str(folders / family), dtype="float32"), method)
    check(ModelConfig(name=str(folders / "sd15"), dtype="float32"), method)


def test_a_method_for_flow_models_needs_one(folders: Path) -> None:
    model = ModelConfig(name=str(folders / "sd15"), dtype="float32")
    refused(
        "method = 'vgg-flow': matches velocities, and .* is not a model of flow matching; use rsm", model, "vgg-flow"
    )
    check(model, "rsm")


def test_a_run_checks_its_model_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (command, build):
        monkeypatch.setattr(module, "planned", lambda *_: pytest.fail("the run is planned"))
    config = small(model=ModelConfig(name="testbed-flow", dtype="float32"), method="dag")
    with pytest.raises(ValueError, match="method = 'dag': the sampler ends at the clean sample"):
        Trainer.from_config(config)
    assert train.main(["testbed-flow", "--method", "dag", "--dry-run"]) == 2
    assert "the sampler ends at the clean sample" in " ".join(capsys.readouterr().err.split())
