"""Diffusers pipelines in and out: loading, schedulers, prompt embeddings, trained weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from fastnabla.config.sections import ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.models.conditions import Conditions
from fastnabla.models.lora import ADAPTER
from fastnabla.models.model_config import Pipeline, configurations, family_of, loading, source_of, vae_dtype
from fastnabla.models.policy import Policy
from fastnabla.models.prompt_cache import CAPACITY, PromptCache
from fastnabla.models.random_init import random_pipeline

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def pipeline_of(config: ModelConfig) -> Pipeline:
    """The pipeline that `config` names, frozen: from a folder, the hub, the package ("testbed"), or with random weights.

    Raises:
        ValueError: it cannot be found or loaded, is of another family, or lacks a part that finetuning needs.
    """
    dtypes = {"default": getattr(torch, config.dtype), "vae": vae_dtype(config, *configurations(config))}
    pipeline = random_pipeline(architecture_of(config.name), dtypes) if config.random_init else _load(config, dtypes)
    for part in _networks(pipeline):
        part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(config: ModelConfig, dtypes: dict[str, torch.dtype]) -> Pipeline:
    family, name = family_of(config), config.name
    absent = {"safety_checker": None, "requires_safety_checker": False} if family is StableDiffusionPipeline else {}
    with loading(config):
        pipeline = family.from_pretrained(
            source_of(config), revision=config.revision, variant=config.variant, dtype=dtypes, **absent
        )
    parts = PARTS + (("text_encoder_2", "tokenizer_2") if isinstance(pipeline, StableDiffusionXLPipeline) else ())
    missing = [part for part in parts if getattr(pipeline, part, None) is None]
    if missing:
        raise ValueError(
            f"model.name = {name!r}: the pipeline has no {', '.join(missing)}; finetuning needs {', '.join(parts)}."
        )
    return pipeline


def _networks(pipeline: Pipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def text_encoders(pipeline: Pipeline) -> list[nn.Module]:
    """Its one or two text encoders."""
    return [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]


def tokenizers(pipeline: Pipeline) -> list[PreTrainedTokenizerBase]:
    """Its one or two tokenizers."""
    return [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]


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


def use_scheduler(pipeline: Pipeline, kind: str) -> None:
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
def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], most: int | None = None) -> Conditions:
    """What the UNet is given for `prompts`, as the pipeline itself encodes them; Stable Diffusion XL's size conditions
    are those of an image of its full size that was not cropped.

    More than `most` prompts are encoded when they are needed, one at a time, on the device on which the text encoders are
    now, wherever they are then. What is done depends on the prompts alone, not on which of them a run sees, so that a run
    that is extended goes on with the same numbers.

    Args:
        pipeline: with its text encoders where they are to compute.
        prompts: texts, by number.
        most: that are encoded at once, in batches, and that are kept of more; None for `CAPACITY`.
    """
    most = CAPACITY if most is None else most
    device = pipeline.text_encoder.device

    def encode(texts: list[str], guided: bool) -> tuple[Tensor | None, ...]:
        return pipeline.encode_prompt(texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided)

    def encode_each(texts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        encoders = {encoder: encoder.device for encoder in text_encoders(pipeline)}
        for encoder in encoders:
            encoder.to(device)
        embeddings = [encode([text], guided=False)[::2] for text in texts]
        for encoder, place in encoders.items():
            encoder.to(place)
        return embeddings

    # In the order (text, unconditional text) or (text, unconditional text, pooled, unconditional pooled).
    unconditional = encode([""], guided=True)[1::2]
    time_ids = None
    if len(unconditional) > 1:
        size = image_size(pipeline)
        time_ids = torch.tensor((*size, 0, 0, *size), dtype=unconditional[0].dtype, device=device)
    if len(prompts) > most:
        return PromptCache(prompts, encode_each, unconditional, time_ids, most)
    parts = [encode(list(prompts[start : start + 64]), guided=False)[::2] for start in range(0, len(prompts), 64)]
    text, *pooled = (torch.cat(column) for column in zip(unconditional, *parts, strict=True))
    return Conditions(text, *(pooled or [None]), time_ids)


def image_size(pipeline: Pipeline) -> tuple[int, int]:
    """(H, W) of the pipeline's images, in pixels."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return side, side


def latent_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    """(C, H, W) of its latents."""
    side = pipeline.unet.config.sample_size
    return pipeline.unet.config.in_channels, side, side


def save_policy(policy: Policy, run: Path, dtype: torch.dtype, write: bool = True) -> None:
    """Write what is trained into the folder `run`: a LoRA as lora/, or all parameters, as `dtype`, as unet/.

    Args:
        policy: if it is sharded, every process calls this.
        run: made if it is not there.
        dtype: of all parameters.
        write: whether this process does.
    """
    if not policy.is_lora:
        weights = {}
        for name, parameter in policy.trained().items():
            weight = parameter.detach().to(dtype)
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if write:
                weights[name] = weight.cpu()
        if write:
            unet = UNet2DConditionModel.from_config(policy.unet.config).to(dtype)
            unet.load_state_dict(weights)
            unet.save_pretrained(run / "unet")
        return
    if not write:
        return
    # With PEFT's names: diffusers' older ones exist for attention alone, and a file with both loads incompletely.
    layers = get_peft_model_state_dict(policy.unet, adapter_name=ADAPTER)
    layers = {name: layer.contiguous() for name, layer in layers.items()}
    StableDiffusionPipeline.save_lora_weights(run / "lora", unet_lora_layers=layers)


def require_policy(run: Path) -> None:
    """Make sure that `save_policy` has written into the folder `run`.

    Raises:
        ValueError: it has not.
    """
    if not any((run / trained).is_dir() for trained in ("lora", "unet")):
        raise ValueError(f"{str(run)!r} has no lora/ or unet/ yet: the run has not reached its first evaluation.")


@torch.no_grad()
def read_policy(policy: Policy, run: Path) -> None:
    """Give `policy`, built as the run's, what `save_policy` wrote into the folder `run`.

    Raises:
        ValueError: there is nothing, it cannot be read, or it is of another network or LoRA.
    """
    require_policy(run)
    trained = policy.trained()
    try:
        if policy.is_lora:
            state, _ = StableDiffusionPipeline.lora_state_dict(run / "lora")
            state = {name.removeprefix("unet."): layer for name, layer in state.items()}
            suffix = f".{ADAPTER}.weight"
            saved = {name.replace(".weight", suffix): w for name, w in convert_unet_state_dict_to_peft(state).items()}
        else:
            saved = UNet2DConditionModel.from_pretrained(run / "unet").state_dict()
        if saved.keys() != trained.keys():
            raise ValueError(f"it has {len(saved)} tensors, the policy {len(trained)}, or under other names")
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(run)!r}: its trained weights do not fit its configuration ({error}).") from error


def load_policy(pipeline: Pipeline, run: Path) -> None:
    """Give `pipeline` what `save_policy` wrote."""
    if (run / "lora").is_dir():
        pipeline.load_lora_weights(run / "lora")
    else:
        unet = UNet2DConditionModel.from_pretrained(run / "unet", dtype=pipeline.unet.dtype)
        pipeline.unet = unet.to(pipeline.unet.device)
