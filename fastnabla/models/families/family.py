"""What a family of diffusion models does its own way: parts, sizes, text encoding, the network's call, saving.

`fastnabla.models.families` has one class for each. Nothing else in the package names a family.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastnabla.models.families.parts import Parts
from fastnabla.models.known_configuration import Known

Configuration = Mapping[str, Any]
"""The configuration of a network, complete with the library's defaults."""
VAE_CLASS = "AutoencoderKL"


def tokenizer_of(encoder: str) -> str:
    """Name of the tokenizer of the text encoder of this name."""
    return encoder.replace("text_encoder", "tokenizer")


class Family(abc.ABC):
    """A family of models; stateless.

    *Embeddings* of a prompt are ``{"text": [L, D]}``, and for some families ``"pooled": [E]``. *Conditions* are the embeddings
    of N rows, `[N, …]`, with the inputs that all rows share.
    """

    pipeline: ClassVar[type[DiffusionPipeline]]
    """Class of the pipelines."""
    network: ClassVar[str]
    """The pipeline's part that is finetuned, and the folder of its weights."""
    network_class: ClassVar[type[nn.Module]]
    text_encoders: ClassVar[Mapping[str, type[nn.Module]]]
    """The pipeline's text encoders, by part."""
    text_lengths: ClassVar[Mapping[str, int]]
    """Tokens of a prompt in the pretrained models, by text encoder. More are cut off."""
    scheduler: ClassVar[type[SchedulerMixin]]
    """Class of the scheduler with which the architecture is described (`fastnabla.models.architectures`)."""
    blocks: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of the network's repeated blocks, which ``compile=blocks`` compiles."""
    absent: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    """Arguments of the pipeline that leave out parts which text-to-image does not need. Their classes may be gone from the
    library, as CLIPFeatureExtractor is."""
    known: ClassVar[Mapping[str, Known]]
    """By configuration file: its known settings."""
    tiny_decoder: ClassVar[str]
    """Hub id of the `AutoencoderTiny` made for the family's VAE."""
    vae_overflows: ClassVar[bool] = False
    """Whether the VAE overflows in float16, unless its configuration has ``force_upcast = False``."""

    def __str__(self) -> str:
        return self.pipeline.__name__

    @property
    def part_classes(self) -> dict[str, str]:
        """The classes of the pipeline's networks, by part."""
        encoders = {name: encoder.__name__ for name, encoder in self.text_encoders.items()}
        return {self.network: self.network_class.__name__, "vae": VAE_CLASS} | encoders

    @property
    def parts(self) -> tuple[str, ...]:
        """The pipeline's parts that finetuning needs."""
        return (self.network, "vae", *self.text_encoders, *map(tokenizer_of, self.text_encoders), "scheduler")

    # Sizes

    @abc.abstractmethod
    def channels(self, network: Configuration) -> int:
        """Channels C of the latents that the network denoises."""

    @abc.abstractmethod
    def sample_size(self, network: Configuration) -> tuple[int, int] | None:
        """(H, W) of the latents that the network was trained with; None if its configuration has no valid size."""

    @abc.abstractmethod
    def latent_multiple(self, network: Configuration) -> int:
        """Heights and widths of the latents must be multiples of this."""

    def largest_size(self, network: Configuration) -> int | None:
        """The largest height and width of the latents; None for no limit."""
        return None

    def tokens(self, network: Configuration, height: int, width: int) -> int:
        """Number of image tokens of latents of this height and width, by which a flow model may shift its noise levels."""
        return height * width // self.latent_multiple(network) ** 2

    # Texts

    @abc.abstractmethod
    def embedding_shapes(self, network: Configuration, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of a prompt's embeddings.

        Args:
            network: the network's configuration.
            lengths: tokens of a prompt by text encoder, in the form of `text_lengths`.
        """

    @abc.abstractmethod
    def encode(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The embeddings of N prompts, `[N, …]` each, as the pipeline itself encodes them."""

    @abc.abstractmethod
    def encode_nothing(self, pipeline: DiffusionPipeline) -> tuple[Tensor, ...]:
        """The unconditional embeddings of classifier-free guidance, `[1, …]` each."""

    def limit_tokenizers(self, pipeline: DiffusionPipeline) -> None:
        """Bound the tokenizers' lengths by what the text encoders read. One without a limit would pad to 10³⁰ tokens."""
        for name in self.text_encoders:
            tokenizer = getattr(pipeline, tokenizer_of(name))
            limit = self.text_limit(name, getattr(pipeline, name).config)
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)

    def sampling_arguments(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Arguments with which a call of the pipeline encodes prompts as `encode` does."""
        return {}

    def text_limit(self, encoder: str, config: PreTrainedConfig) -> int:
        """Tokens that the text encoder of this name reads; more are cut off."""
        return getattr(config, "max_position_embeddings", self.text_lengths[encoder])

    @property
    def readers(self) -> list[str]:
        """The text encoders that read most of a prompt; all if they read equally much."""
        most = max(self.text_lengths.values())
        return [name for name, length in self.text_lengths.items() if length == most]

    # Calls

    @staticmethod
    @abc.abstractmethod
    def call(network: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The network's output `[N, C, H, W]` at states `x [N, C, H, W]`.

        Args:
            network: of the family.
            x: the states.
            timestep: the scheduler's, `[N]`.
            conditions: of the rows, `[N, …]` each.
        """

    def guidance_problem(self, network: Configuration, guidance_scale: float) -> str | None:
        """Why the network cannot be guided with this scale, and what to do; None if it can."""
        if guidance_scale >= 1:
            return None
        return "diffusers' pipelines guide with scales above 1 only, so they could not sample what is trained; use at least 1."

    def guidance_input(self, network: nn.Module, guidance_scale: float | None) -> dict[str, Tensor]:
        """The guidance scale w as a condition, without the rows, for a network into which guidance was distilled; {} for
        others.

        """
        return {}

    def size_input(self, size: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The condition of an image of `size` (H, W), in pixels, without the rows; {} if there is none."""
        return {}

    # Checks

    def misfits(self, parts: Parts) -> Iterator[str]:
        """What of the network does not fit the VAE and the text encoders, each as FIELD = VALUE: REMEDY."""
        yield from ()
