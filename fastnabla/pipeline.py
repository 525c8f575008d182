"""Diffusers pipelines in and out: loading, schedulers, prompt embeddings, trained weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers, logging
from peft import get_peft_model_state_dict
from torch import Tensor

from fastnabla.config import ModelConfig
from fastnabla.lora import ADAPTER
from fastnabla.policy import Policy
from fastnabla.random_init import random_pipeline
from fastnabla.testbed import pipeline_folder

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def load_pipeline(
    name: str, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """A Stable-Diffusion-shaped pipeline, frozen, from a folder, the hub, or the package ("testbed").

    Raises:
        ValueError: it cannot be found or loaded, or lacks a part that finetuning needs.
    """
    logging.disable_progress_bar()
    source = pipeline_folder() if name == "testbed" else name
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            source, revision=revision, dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"model.name = {name!r}: no diffusers StableDiffusionPipeline could be loaded from it ({error}). Give a local "
            f"folder with a model_index.json, 'testbed', or a hub id downloaded with: hf download {name}"
        ) from error
    missing = [part for part in PARTS if getattr(pipeline, part, None) is None]
    if missing:
        raise ValueError(
            f"model.name = {name!r}: the pipeline has no {', '.join(missing)}; finetuning needs {', '.join(PARTS)}."
        )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(config: ModelConfig) -> StableDiffusionPipeline:
    """The pipeline that `config` names, or one with random weights; see `load_pipeline`."""
    dtype = getattr(torch, config.dtype)
    if not config.random_init:
        return load_pipeline(config.name, config.revision, dtype)
    pipeline = random_pipeline(dtype)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


def load_tiny_decoder(name: str, dtype: torch.dtype) -> AutoencoderTiny:
    """The `AutoencoderTiny` in the folder `name`, or of that name on the hub.

    Raises:
        ValueError: it cannot be found or loaded.
    """
    try:
        return AutoencoderTiny.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"model.tiny_decoder = {name!r}: no diffusers AutoencoderTiny could be loaded from it ({error}). Give a local "
            f"folder, or a hub id downloaded with: hf download {name}"
        ) from error


def use_scheduler(pipeline: StableDiffusionPipeline, kind: str) -> None:
    """Give `pipeline` the scheduler `kind` ("ddim" or "sde-dpmsolver++") with the noise schedule it was trained with.

    Raises:
        ValueError: the pipeline's scheduler does not describe a discrete variance-preserving diffusion.
    """
    config = pipeline.scheduler.config
    if "beta_schedule" not in config or "prediction_type" not in config:
        raise ValueError(
            f"the model's scheduler, {type(pipeline.scheduler).__name__}, is not supported: it has no beta_schedule and "
            "prediction_type to build a DDIM or SDE-DPM-Solver++ sampler from."
        )
    if kind == "ddim":
        absent = {"clip_sample": False, "set_alpha_to_one": False}
        changes = {name: value for name, value in absent.items() if name not in config}
        pipeline.scheduler = DDIMScheduler.from_config(config, **changes)
    else:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min"
        )


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Text embeddings `[1 + P, L, D]`: of the empty prompt, then of `prompts`."""
    tokens = pipeline.tokenizer(
        ["", *prompts],
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(pipeline.text_encoder.device)
    return torch.cat([pipeline.text_encoder(part)[0] for part in tokens.split(64)])


def image_size(pipeline: StableDiffusionPipeline) -> tuple[int, int]:
    """(H, W) of the pipeline's images, in pixels."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return side, side


def latent_shape(pipeline: StableDiffusionPipeline) -> tuple[int, int, int]:
    """(C, H, W) of its latents."""
    side = pipeline.unet.config.sample_size
    return pipeline.unet.config.in_channels, side, side


def save_policy(policy: Policy, run: Path, dtype: torch.dtype) -> None:
    """Write what is trained into the folder `run`: a LoRA as lora/, or all parameters, as `dtype`, as unet/."""
    if not policy.is_lora:
        unet = UNet2DConditionModel.from_config(policy.unet.config).to(dtype)
        unet.load_state_dict(policy.unet.state_dict())
        unet.save_pretrained(run / "unet")
        return
    layers: dict[str, Any] = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(policy.unet, adapter_name=ADAPTER)
    )
    layers = {name: layer.contiguous() for name, layer in layers.items()}
    StableDiffusionPipeline.save_lora_weights(run / "lora", unet_lora_layers=layers)


def load_policy(pipeline: StableDiffusionPipeline, run: Path) -> None:
    """Give `pipeline` what `save_policy` wrote."""
    if (run / "lora").is_dir():
        pipeline.load_lora_weights(run / "lora")
    else:
        unet = UNet2DConditionModel.from_pretrained(run / "unet", dtype=pipeline.unet.dtype)
        pipeline.unet = unet.to(pipeline.unet.device)
