"""`model.tiny_decoder`: an AutoencoderTiny that decodes where the training step needs gradients."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from fastnabla.utils.safetensors_file import read_header


@contextlib.contextmanager
def _loading(name: str) -> Iterator[str]:
    """Where it is; errors say how to get it."""
    try:
        yield os.path.expanduser(name)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"model.tiny_decoder = {name!r}: cannot be loaded as a diffusers AutoencoderTiny ({error}). Give a local "
            f"folder, or a Hub id downloaded with: hf download {name}"
        ) from error


def load_tiny_decoder(name: str, dtype: torch.dtype) -> AutoencoderTiny:
    """The `AutoencoderTiny` in the folder `name`, or of that name on the Hub.

    Raises:
        ValueError: it is not found or cannot be loaded, or its file is damaged or lacks weights.
    """
    with _loading(name) as source:
        for file in sorted(Path(source).glob("*.safetensors")):
            read_header(file)
        decoder = AutoencoderTiny.from_pretrained(source, dtype=dtype, use_safetensors=True)
        # diffusers leaves weights that the file lacks on the meta device.
        if missing := [weight for weight, value in decoder.named_parameters() if value.is_meta]:
            raise ValueError(f"its file lacks {len(missing)} weights, such as {missing[0]}")
        return decoder


def tiny_decoder_config(name: str) -> dict[str, Any]:
    """Its configuration, as in its file.

    Raises:
        ValueError: it is not found, or is not an `AutoencoderTiny`.
    """
    with _loading(name) as source:
        config = AutoencoderTiny.load_config(source)
        if (found := config.get("_class_name")) != AutoencoderTiny.__name__:
            raise ValueError(f"it is a {found}")
        return config
