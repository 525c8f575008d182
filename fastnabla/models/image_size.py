"""The size of a model's images: `model.height` and `model.width`, or the size that its UNet was trained with."""

import math
from collections.abc import Mapping
from typing import Any

from fastnabla.config.model_sections import ModelConfig

PIPELINE_MULTIPLE = 8
"""diffusers' pipelines refuse heights and widths that this does not divide."""


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along each axis, of a VAE's configuration."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def image_size(model: ModelConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of the images of `model`, in pixels.

    Args:
        model: whose height and width, where set, take precedence over the UNet's own size.
        unet, vae: complete configurations, without `size_problems`.
    """
    latents = _latent_size(unet) or (0, 0)
    height, width = (side * vae_factor(vae) for side in latents)
    return model.height or height, model.width or width


def latent_shape(model: ModelConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the latents of `model`. Arguments as for `image_size`."""
    height, width = (side // vae_factor(vae) for side in image_size(model, unet, vae))
    return unet["in_channels"], height, width


def size_problems(model: ModelConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> list[str]:
    """Why the images of `model` have no valid size, as FIELD = VALUE: REMEDY; [] if they have one.

    Both sides must be multiples of the pixels that the coarsest level of the UNet sees as one, and of `PIPELINE_MULTIPLE`.

    Args:
        model: with the requested height and width.
        unet, vae: complete configurations.
    """
    if _latent_size(unet) is None and None in (model.height, model.width):
        return [
            f"unet.sample_size = {unet['sample_size']!r}: is neither a size nor a pair [height, width]; set the size of the "
            "images in pixels with --model.height and --model.width"
        ]
    multiple = math.lcm(vae_factor(vae) * 2 ** (len(unet["block_out_channels"]) - 1), PIPELINE_MULTIPLE)
    problems = []
    for name, side in zip(("height", "width"), image_size(model, unet, vae), strict=True):
        if side % multiple:
            below, above = side // multiple * multiple, (side // multiple + 1) * multiple
            nearest = f"{below} and {above}" if below else f"{above}"
            given = f"model.{name} = {side}"
            if getattr(model, name) is None:
                given = f"unet.sample_size = {unet['sample_size']!r}, a {name} of {side} pixels"
            problems.append(
                f"{given}: must be a multiple of {multiple}; the nearest for --model.{name} {'are' if below else 'is'} "
                f"{nearest}"
            )
    return problems


def _latent_size(unet: Mapping[str, Any]) -> tuple[int, int] | None:
    """(H, W) of a UNet's `sample_size`, which may be a pair; None if it is not a size.

    diffusers reads sizes below 64 as 64 in configurations older than 0.9.0, whose conversion script wrote wrong ones.
    """
    size = unet["sample_size"]
    if type(size) is int:
        version = unet.get("_diffusers_version", "1.0")
        is_old = [int(part) for part in version.split(".")[:2]] < [0, 9]
        size = [max(size, 64) if is_old else size] * 2
    valid = isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return tuple(size) if valid else None
