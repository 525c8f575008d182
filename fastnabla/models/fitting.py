"""Whether the parts of a pipeline fit each other, judged by their configurations before any weights are loaded."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, PreTrainedTokenizerBase

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.models.image_size import size_problems, vae_factor
from fastnabla.models.model_config import configurations, is_xl, loading, text_width
from fastnabla.models.model_source import source_of
from fastnabla.models.tiny_decoder import tiny_decoder_config

XL = "StableDiffusionXLPipeline"
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""The networks of a pipeline and their classes. The second text encoder is Stable Diffusion XL's."""
UNLIMITED = 10**20
"""A `model_max_length` above this is transformers' value for a tokenizer whose configuration has none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Configurations of a pipeline's parts, complete with the library's defaults."""

    is_xl: bool
    """Whether the pipeline is Stable Diffusion XL's."""
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: Mapping[str, CLIPTextConfig]
    """By name, text_encoder and text_encoder_2."""
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    """By name of their text encoders."""
    tiny_decoder: Mapping[str, Any] | None = None


def checked_configurations(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of the UNet and the VAE of `model`, whose parts fit each other.

    Raises:
        ValueError: they cannot be read, or parts do not fit each other, `model.height`, `model.width` or
            `model.tiny_decoder`. The message names all of them.
    """
    unet, vae = configurations(model)
    problems, parts = _read(model, unet, vae)
    problems += misfits(parts, model)
    if problems:
        found = problems[0] if len(problems) == 1 else "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
        raise ValueError(f"model.name = {model.name!r}: {found}.")
    return unet, vae


def misfits(parts: Parts, model: ModelConfig) -> list[str]:
    """What does not fit, each as FIELD = VALUE: REMEDY; [] if all parts fit.

    Args:
        parts: of the pipeline. Checks that need a missing text encoder or tokenizer are left out.
        model: with the requested height and width.
    """
    problems = [*_channels(parts), *_conditions(parts), *_texts(parts), *_tokens(parts), *_tiny_decoder(parts, model)]
    return problems + size_problems(model, parts.unet, parts.vae)


def _read(model: ModelConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[list[str], Parts]:
    """The parts of `model` that can be read, and problems with the others."""
    problems, texts, tokenizers = [], {}, {}
    if model.random_init:
        sizes = architecture_of(model.name).text_encoders
        xl = len(sizes) > 1
        texts = {
            name: CLIPTextConfig(**own) for name, own in zip(("text_encoder", "text_encoder_2"), sizes, strict=False)
        }
    else:
        with loading(model):
            index = DiffusionPipeline.load_config(source_of(model), revision=model.revision)
        xl = index["_class_name"] == XL
        problems = _class_problems(index, xl)
        with loading(model):
            for name in _encoders(xl):
                if _class_of(index, name) == CLASSES[name]:
                    texts[name] = CLIPTextConfig.from_pretrained(
                        source_of(model), subfolder=name, revision=model.revision
                    )
                tokenizer = getattr(transformers, _class_of(index, _tokenizer(name)) or "", None)
                if tokenizer is not None:
                    tokenizers[name] = tokenizer.from_pretrained(
                        source_of(model), subfolder=_tokenizer(name), revision=model.revision
                    )
    tiny = None if model.tiny_decoder is None else _complete(AutoencoderTiny, tiny_decoder_config(model.tiny_decoder))
    return problems, Parts(
        is_xl=xl,
        unet=_complete(UNet2DConditionModel, unet),
        vae=_complete(AutoencoderKL, vae),
        text_encoders=texts,
        tokenizers=tokenizers,
        tiny_decoder=tiny,
    )


def _complete(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of `cls` for missing entries."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)


def _encoders(xl: bool) -> tuple[str, ...]:
    return ("text_encoder", "text_encoder_2") if xl else ("text_encoder",)


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    """Name of a part's class in a pipeline's model_index.json; None if the pipeline lacks the part."""
    return (index.get(part) or (None, None))[1]


def _class_problems(index: Mapping[str, Any], xl: bool) -> list[str]:
    encoders = _encoders(xl)
    needed = ("unet", "vae", *encoders, *map(_tokenizer, encoders), "scheduler")
    problems = []
    if missing := [part for part in needed if _class_of(index, part) is None]:
        problems.append(f"the pipeline has no {', '.join(missing)}: finetuning needs {', '.join(needed)}")
    for part in needed:
        found, wanted = _class_of(index, part), CLASSES.get(part)
        if wanted is not None and found not in (None, wanted):
            advice = "; for a faster decoder use --model.tiny-decoder" if found == "AutoencoderTiny" else ""
            problems.append(f"{part} = {found}: must be {wanted}{advice}")
        elif part.startswith("tokenizer") and found is not None and not hasattr(transformers, found):
            problems.append(f"{part} = {found}: must be a class of transformers, such as CLIPTokenizer")
        elif part == "scheduler" and found is not None and not hasattr(diffusers, found):
            problems.append(
                f"scheduler = {found}: must be a class of diffusers, such as DDIMScheduler with the noise schedule that the UNet "
                "was trained with; correct model_index.json and scheduler/scheduler_config.json"
            )
    return problems


def _channels(parts: Parts) -> Iterator[str]:
    unet, latents, images = parts.unet, parts.vae["latent_channels"], parts.vae["out_channels"]
    inputs, outputs = unet["in_channels"], unet["out_channels"]
    if inputs == outputs != latents:
        yield (
            f"vae.latent_channels = {latents}: the UNet's latents have {inputs} channels; use the VAE that the UNet was "
            "trained with"
        )
    elif inputs != latents:
        kind = {latents + 5: "an inpainting", latents + 1: "a depth-to-image", 2 * latents: "an image-editing"}
        yield (
            f"unet.in_channels = {inputs}: must be vae.latent_channels = {latents}; this is "
            f"{kind.get(inputs, 'not a text-to-image')} model, use the text-to-image model that it was made from"
        )
    if outputs not in (inputs, latents):
        yield (
            f"unet.out_channels = {outputs}: must be vae.latent_channels = {latents}; UNets that also predict a variance are "
            "not supported"
        )
    if images != 3:
        yield f"vae.out_channels = {images}: must be 3, because rewards take RGB images; use the VAE of an RGB model"
    levels = len(parts.vae["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(parts.vae[name]) != levels:
            yield (
                f"vae.{name} = {parts.vae[name]!r}: must have {levels} blocks, one for each of vae.block_out_channels; correct "
                "vae/config.json"
            )


def _conditions(parts: Parts) -> Iterator[str]:
    unet = parts.unet
    for name in ("class_embed_type", "num_class_embeds"):
        if unet[name] is not None:
            yield (
                f"unet.{name} = {unet[name]!r}: class labels (of an upscaler or of unCLIP) are not supported; use a "
                "text-to-image model"
            )
    if is_xl(unet) != parts.is_xl:
        needed, kind = ("text_time", "XL") if parts.is_xl else (None, "1 or 2")
        yield (
            f"unet.addition_embed_type = {unet['addition_embed_type']!r}: must be {needed!r} in a pipeline of Stable Diffusion "
            f"{kind}; correct _class_name in model_index.json, or use the UNet of such a model"
        )
    elif parts.is_xl and (second := parts.text_encoders.get("text_encoder_2")) is not None:
        width, pooled = unet["projection_class_embeddings_input_dim"], second.projection_dim
        each = unet["addition_time_embed_dim"] or 0
        if width == 5 * each + pooled:
            yield (
                f"unet.projection_class_embeddings_input_dim = {width!r}: takes five size conditions, as Stable Diffusion "
                "XL's refiner, which refines images; use the base model"
            )
        elif width != 6 * each + pooled:
            yield (
                f"unet.projection_class_embeddings_input_dim = {width!r}: must be 6 · addition_time_embed_dim + "
                f"text_encoder_2.projection_dim = 6 · {each} + {pooled} = {6 * each + pooled}; use the second text encoder "
                "that the UNet was trained with"
            )


def _texts(parts: Parts) -> Iterator[str]:
    texts = parts.text_encoders
    if texts.keys() != set(_encoders(parts.is_xl)):
        return
    width, dims = text_width(parts.unet), {name: encoder.hidden_size for name, encoder in texts.items()}
    if width != sum(dims.values()):
        field = "encoder_hid_dim" if parts.unet["encoder_hid_dim"] else "cross_attention_dim"
        own = " + ".join(f"{name}.hidden_size" for name in dims) + " = " + " + ".join(map(str, dims.values()))
        total = f" = {sum(dims.values())}" if len(dims) > 1 else ""
        yield (
            f"unet.{field} = {parts.unet[field]!r}: must be {own}{total}; use the text encoder that the UNet was trained with"
        )


def _tokens(parts: Parts) -> Iterator[str]:
    lengths = {}
    for name, tokenizer in parts.tokenizers.items():
        own, encoder = _tokenizer(name), parts.text_encoders.get(name)
        if encoder is None:
            continue
        positions, length = encoder.max_position_embeddings, tokenizer.model_max_length
        lengths[f"{own}.model_max_length"] = positions if length > UNLIMITED else length
        if positions < length <= UNLIMITED:
            yield (
                f"{own}.model_max_length = {length}: the text encoder has {positions} positions; set it to {positions} in "
                f"{own}/tokenizer_config.json"
            )
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        if vocabulary.keys() <= set(tokenizer.all_special_tokens):  # transformers' substitute for missing files
            yield f"{own}.vocab: has no words; its folder lacks tokenizer.json, or vocab.json and merges.txt"
        elif size > encoder.vocab_size:
            yield (
                f"{name}.vocab_size = {encoder.vocab_size}: the {own} has {size} tokens, and those added have no embedding; "
                f"use the text encoder that was saved with it, or remove its added tokens"
            )
        if tokenizer.pad_token_id is None:
            yield f"{own}.pad_token = None: prompts cannot be padded; set it in {own}/tokenizer_config.json"
    if len(set(lengths.values())) > 1:
        values = ", ".join(f"{field} = {length}" for field, length in lengths.items())
        yield f"{values}: must be equal, because the UNet takes both encoders' embeddings side by side; use the smaller"


def _tiny_decoder(parts: Parts, model: ModelConfig) -> Iterator[str]:
    tiny, vae, own = parts.tiny_decoder, parts.vae, f"model.tiny_decoder = {model.tiny_decoder!r}"
    if tiny is None:
        return
    advice = "use the one made for this VAE, such as madebyollin/" + ("taesdxl" if parts.is_xl else "taesd")
    factor = tiny["upsampling_scaling_factor"] ** (len(tiny["num_decoder_blocks"]) - 1)
    for name, value, needed in (
        ("latent channels", tiny["latent_channels"], vae["latent_channels"]),
        ("image channels", tiny["out_channels"], vae["out_channels"]),
        ("pixels per latent", factor, vae_factor(vae)),
    ):
        if value != needed:
            yield f"{own}: it has {value} {name} and the VAE {needed}; {advice}"
