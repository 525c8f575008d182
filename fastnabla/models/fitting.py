"""Whether the parts of a pipeline fit each other, judged by their configurations before any weights are loaded."""

import dataclasses
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderTiny, SchedulerMixin
from transformers import PreTrainedTokenizerBase

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.models.description import Description, class_of, complete, described, loading, pipeline_index
from fastnabla.models.families import Family, Parts, tokenizer_of
from fastnabla.models.image_size import size_problems, vae_factor
from fastnabla.models.model_source import source_of
from fastnabla.models.tiny_decoder import tiny_decoder_config

UNLIMITED = 10**20
"""A `model_max_length` above this is transformers' value for a tokenizer whose configuration has none."""


def checked_description(model: ModelConfig) -> Description:
    """The description of `model`, whose parts fit each other.

    Raises:
        ValueError: its files cannot be read, or parts do not fit each other, `model.height`, `model.width` or
            `model.tiny_decoder`. The message names all of them.
    """
    description = described(model)
    problems, parts = _read(model, description)
    with loading(model):  # a setting of another type may fail anywhere
        problems += misfits(parts, model, description)
    if problems:
        found = problems[0] if len(problems) == 1 else "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
        raise ValueError(f"model.name = {model.name!r}: {found}.")
    limits = {name: tokenizer.model_max_length for name, tokenizer in parts.tokenizers.items()}
    lengths = {name: min(limits.get(name, length), length) for name, length in description.lengths.items()}
    return dataclasses.replace(description, lengths=lengths)


def misfits(parts: Parts, model: ModelConfig, description: Description) -> list[str]:
    """What does not fit, each as FIELD = VALUE: REMEDY; [] if all parts fit.

    Args:
        parts: of the pipeline. Checks that need a missing text encoder or tokenizer are left out.
        model: with the requested height and width.
        description: of the model.
    """
    family = description.family
    problems = [*family.misfits(parts), *_vae(parts), *_tokens(parts), *_tiny_decoder(parts, model, family)]
    return problems + size_problems(model, description)


def _read(model: ModelConfig, description: Description) -> tuple[list[str], Parts]:
    """The parts of `model` that can be read, and problems with the others."""
    family, problems, texts, tokenizers = description.family, [], {}, {}
    if model.random_init:
        sizes = architecture_of(model.name).text_encoders
        texts = {
            name: encoder.config_class(**own)
            for (name, encoder), own in zip(family.text_encoders.items(), sizes, strict=True)
        }
    else:
        index = pipeline_index(model)
        problems = _class_problems(index, family)
        with loading(model):
            for name, encoder in family.text_encoders.items():
                if class_of(index, name) == encoder.__name__:
                    texts[name] = encoder.config_class.from_pretrained(
                        source_of(model), subfolder=name, revision=model.revision
                    )
                tokenizer = _class_in(transformers, class_of(index, tokenizer_of(name)), PreTrainedTokenizerBase)
                if tokenizer is not None:
                    tokenizers[name] = tokenizer.from_pretrained(
                        source_of(model), subfolder=tokenizer_of(name), revision=model.revision
                    )
    tiny = None if model.tiny_decoder is None else complete(AutoencoderTiny, tiny_decoder_config(model.tiny_decoder))
    return problems, Parts(
        network=description.network,
        vae=description.vae,
        text_encoders=texts,
        tokenizers=tokenizers,
        tiny_decoder=tiny,
    )


def _class_in(library: ModuleType, name: str | None, base: type) -> type | None:
    """The subclass of `base` of this name. Other classes, such as AutoTokenizer, may run code that comes with a model."""
    found = getattr(library, name or "", None)
    return found if isinstance(found, type) and issubclass(found, base) else None


def _class_problems(index: Mapping[str, Any], family: Family) -> list[str]:
    classes, needed, problems = family.part_classes, family.parts, []
    if missing := [part for part in needed if class_of(index, part) is None]:
        problems.append(
            f"the pipeline has no {', '.join(missing)}: finetuning needs {', '.join(needed)}; use a checkpoint that has all"
        )
    for part in needed:
        found, wanted = class_of(index, part), classes.get(part)
        if wanted is not None and found not in (None, wanted):
            advice = "; for a faster decoder use --model.tiny-decoder" if found == "AutoencoderTiny" else ""
            problems.append(f"{part} = {found}: must be {wanted}{advice}")
        elif part.startswith("tokenizer") and found is not None:
            if _class_in(transformers, found, PreTrainedTokenizerBase) is None:
                problems.append(f"{part} = {found}: must be a tokenizer of transformers, such as CLIPTokenizer")
        elif part == "scheduler" and found is not None and _class_in(diffusers, found, SchedulerMixin) is None:
            problems.append(
                f"scheduler = {found}: must be a scheduler of diffusers, such as {family.scheduler.__name__} with the noise schedule "
                "that the network was trained with; correct model_index.json and scheduler/scheduler_config.json"
            )
    return problems


def _vae(parts: Parts) -> Iterator[str]:
    if (images := parts.vae["out_channels"]) != 3:
        yield f"vae.out_channels = {images}: must be 3, because rewards take RGB images; use the VAE of an RGB model"
    levels = len(parts.vae["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(parts.vae[name]) != levels:
            yield (
                f"vae.{name} = {parts.vae[name]!r}: must have {levels} blocks, one for each of vae.block_out_channels; correct "
                "vae/config.json"
            )


def _tokens(parts: Parts) -> Iterator[str]:
    lengths = {}
    for name, tokenizer in parts.tokenizers.items():
        own, encoder = tokenizer_of(name), parts.text_encoders.get(name)
        if encoder is None:
            continue
        positions, length = getattr(encoder, "max_position_embeddings", None), tokenizer.model_max_length
        if positions is not None:  # a T5 has relative positions
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
        yield f"{values}: must be equal, because the network takes both encoders' embeddings side by side; use the smaller"


def _tiny_decoder(parts: Parts, model: ModelConfig, family: Family) -> Iterator[str]:
    tiny, vae, own = parts.tiny_decoder, parts.vae, f"model.tiny_decoder = {model.tiny_decoder!r}"
    if tiny is None:
        return
    advice = f"use the one made for this VAE, such as {family.tiny_decoder}"
    factor = tiny["upsampling_scaling_factor"] ** (len(tiny["num_decoder_blocks"]) - 1)
    for name, value, needed in (
        ("latent channels", tiny["latent_channels"], vae["latent_channels"]),
        ("image channels", tiny["out_channels"], vae["out_channels"]),
        ("pixels per latent", factor, vae_factor(vae)),
    ):
        if value != needed:
            yield f"{own}: it has {value} {name} and the VAE {needed}; {advice}"
