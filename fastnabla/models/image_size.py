"""The size of a model's images: `model.height` and `model.width`, or the size that its network was trained with."""

import math
from collections.abc import Mapping
from typing import Any

from fastnabla.config.model_sections import ModelConfig
from fastnabla.models.description import Description

PIPELINE_MULTIPLE = 8
"""diffusers' pipelines refuse heights and widths that this does not divide."""


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along each axis, of a VAE's configuration."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def image_size(model: ModelConfig, description: Description) -> tuple[int, int]:
    """(H, W) of the images of `model`, in pixels.

    Args:
        model: whose height and width, where set, take precedence over the network's own size.
        description: of the model, without `size_problems`.
    """
    latents = description.family.sample_size(description.network) or (0, 0)
    height, width = (side * vae_factor(description.vae) for side in latents)
    return model.height or height, model.width or width


def latent_shape(model: ModelConfig, description: Description) -> tuple[int, int, int]:
    """(C, H, W) of the latents of `model`. Arguments as for `image_size`."""
    height, width = (side // vae_factor(description.vae) for side in image_size(model, description))
    return description.family.channels(description.network), height, width


def size_problems(model: ModelConfig, description: Description) -> list[str]:
    """Why the images of `model` have no valid size, as FIELD = VALUE: REMEDY; [] if they have one.

    Both sides must be multiples of the pixels that the network sees as one (the coarsest level of a UNet, a patch of a
    transformer) and of `PIPELINE_MULTIPLE`, and at most as large as the network's position embeddings allow.

    Args:
        model: with the requested height and width.
        description: of the model, complete with the library's defaults.
    """
    family, network, factor = description.family, description.network, vae_factor(description.vae)
    own = f"{family.network}.sample_size = {network.get('sample_size')!r}"
    if family.sample_size(network) is None and None in (model.height, model.width):
        return [
            f"{own}: is neither a size nor a pair [height, width]; set the size of the images in pixels with --model.height and "
            "--model.width"
        ]
    multiple, largest = (
        math.lcm(factor * family.latent_multiple(network), PIPELINE_MULTIPLE),
        family.largest_size(network),
    )
    problems = []
    for name, side in zip(("height", "width"), image_size(model, description), strict=True):
        given = f"model.{name} = {side}" if getattr(model, name) else f"{own}, a {name} of {side} pixels"
        if side % multiple:
            below, above = side // multiple * multiple, (side // multiple + 1) * multiple
            nearest = f"{below} and {above}" if below else f"{above}"
            problems.append(
                f"{given}: must be a multiple of {multiple}; the nearest for --model.{name} {'are' if below else 'is'} "
                f"{nearest}"
            )
        elif largest is not None and side > largest * factor:
            problems.append(
                f"{given}: the network has position embeddings up to {largest * factor} pixels; use at most that"
            )
    return problems
