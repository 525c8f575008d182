"""What a pretrained model is, read from its configuration files without loading its weights."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.architectures import architecture_of
from fastnabla.models.families import FAMILIES, REFUSED, Configuration, Family
from fastnabla.models.known_configuration import require_known
from fastnabla.models.model_source import remedy, source_of

LIBRARIES = ("diffusers", "transformers")
"""The libraries whose classes the parts of a pipeline may be."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A pretrained model without its weights."""

    family: Family
    network: Configuration
    """Of the network that is finetuned, complete with the library's defaults."""
    vae: Configuration
    """Complete, too."""
    lengths: Mapping[str, int]
    """Tokens of a prompt, by text encoder."""

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a prompt's embeddings, by name."""
        return self.family.embedding_shapes(self.network, self.lengths)

    def vae_dtype(self, model: ModelConfig) -> torch.dtype:
        """The VAE's compute dtype: `model.vae_dtype`, or by default `model.dtype`.

        Instead of float16, the default is float32 for a VAE that overflows in float16, unless its configuration has
        `force_upcast = False` (as in diffusers).
        """
        if model.vae_dtype is not None:
            return getattr(torch, model.vae_dtype)
        overflows = model.dtype == "float16" and self.family.vae_overflows and self.vae.get("force_upcast", True)
        return torch.float32 if overflows else getattr(torch, model.dtype)


@contextlib.contextmanager
def loading(model: ModelConfig) -> Iterator[None]:
    """Within the context, an error in reading the files of `model` becomes a ValueError that names a remedy."""
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # the libraries raise their own types, and tokenizers a plain Exception
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise ValueError(
            f"model.name = {model.name!r}: cannot be loaded as a diffusers pipeline of Stable Diffusion or FLUX "
            f"({' '.join(str(error).split())}). {remedy(model)}"
        ) from error


def family_of(model: ModelConfig) -> Family:
    """The family of `model`.

    Raises:
        ValueError: the model is not found, its pipeline is not supported, or a part is not of diffusers or transformers.
    """
    if model.random_init:
        return architecture_of(model.name).family
    index = pipeline_index(model)
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        why = f", which is not supported because {REFUSED[name]}" if name in REFUSED else ""
        raise ValueError(
            f"model.name = {model.name!r}: it is a {name}{why}; supported are {', '.join(FAMILIES)}. If its network makes images "
            "from text alone, give a copy with one of these as _class_name in model_index.json. Otherwise use the text-to-image "
            "model that it was made from."
        )
    for part in FAMILIES[name].parts:
        _require_known_library(model, part, index.get(part))
    return FAMILIES[name]


def pipeline_index(model: ModelConfig) -> dict[str, Any]:
    """The content of the model_index.json of `model`.

    Raises:
        ValueError: it is not found, or cannot be read.
    """
    source = source_of(model)
    with loading(model):
        return dict(DiffusionPipeline.load_config(source, revision=model.revision))


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """Name of a part's class in a pipeline's model_index.json; None if the pipeline lacks the part."""
    return (index.get(part) or (None, None))[1]


def _require_known_library(model: ModelConfig, part: str, entry: Any) -> None:
    """Check that a part is absent or a class of one of `LIBRARIES`. diffusers may import any other module that is named."""
    if entry in (None, [None, None], (None, None)):
        return
    if not (
        isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] in LIBRARIES and isinstance(entry[1], str)
    ):
        raise ValueError(
            f"model.name = {model.name!r}: model_index.json has {part} = {entry!r:.200}: must be a library, "
            f"{' or '.join(LIBRARIES)}, and its class. Code that comes with a model is never run; use another copy of it."
        )


def described(model: ModelConfig) -> Description:
    """The description of `model`.

    Raises:
        ValueError: its files cannot be read, the pipeline is not supported, or a setting in one of its configuration files is
            not taken into account.
    """
    family = family_of(model)
    if model.random_init:
        architecture = architecture_of(model.name)
        network, vae = architecture.network, architecture.vae
    else:
        with loading(model):
            files = _configuration_files(model, family)
        for file, settings in files.items():
            if not isinstance(settings, dict):
                raise ValueError(f"model.name = {model.name!r}: {file} must be a JSON object. Download it again.")
        require_known(model.name, family.known, files)
        network, vae = files[f"{family.network}/config.json"], files["vae/config.json"]
    return Description(
        family=family,
        network=complete(family.network_class, network),
        vae=complete(AutoencoderKL, vae),
        lengths=family.text_lengths,
    )


def complete(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of `cls` for missing entries."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)


def _configuration_files(model: ModelConfig, family: Family) -> dict[str, dict[str, Any]]:
    """The contents of the configuration files of `model`, by their names. Of the files of absent parts, only those of the
    finetuned network and the VAE are read."""
    source, revision, index = source_of(model), model.revision, pipeline_index(model)
    files = {"model_index.json": index}
    parts: dict[str, type] = {family.network: family.network_class, "vae": AutoencoderKL, "scheduler": DDIMScheduler}
    for folder, part in parts.items():
        if folder != "scheduler" or class_of(index, folder) is not None:
            file = f"{folder}/{part.config_name}"
            files[file] = part.load_config(source, subfolder=folder, revision=revision)
    for folder, encoder in family.text_encoders.items():
        if class_of(index, folder) is not None:
            settings, _ = encoder.config_class.get_config_dict(source, subfolder=folder, revision=revision)
            # The configuration of a CLIP model with both encoders has the text encoder's inside.
            files[f"{folder}/config.json"] = settings.get("text_config") or settings
    return files
