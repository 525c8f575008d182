"""The configurations of a pipeline's parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Configurations of a pipeline's parts, complete with the library's defaults."""

    network: Mapping[str, Any]
    """Of the network that is finetuned."""
    vae: Mapping[str, Any]
    text_encoders: Mapping[str, PreTrainedConfig]
    """By name: text_encoder, text_encoder_2, … Those that are missing are left out."""
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    """By name of their text encoders."""
    tiny_decoder: Mapping[str, Any] | None = None
