"""The ground (background) of the silhouettes. It is independent of the testbed's rewards and of the hue."""

import torch
from torch import Tensor

DARK = 0.5
"""Luminance below which a ground is dark. The testbed's grounds are below 0.12 or above 0.88."""


def ground_luminance(images: Tensor) -> Tensor:
    """Luminance `[B]` of the ground of images `[B, 3, H, W]`, in [0, 1], with Rec. 709 weights of the pixel values.

    It is the median over the border's pixels, so an animal may cover up to half of the border.
    """
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=images.dtype, device=images.device)
    luminance = torch.einsum("bchw,c->bhw", images, weights)
    edges = (luminance[:, 0], luminance[:, -1], luminance[:, 1:-1, 0], luminance[:, 1:-1, -1])
    ordered = torch.cat(edges, 1).sort(1).values  # torch.median has no deterministic algorithm on a GPU
    return ordered[:, (ordered.shape[1] - 1) // 2]


def is_dark(images: Tensor) -> Tensor:
    """Whether the ground of each image is dark, bool `[B]`."""
    return ground_luminance(images) < DARK
