"""FLUX's packed latents: each patch of 2 × 2 latents is one token."""

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 2
"""Height and width of a patch."""


def pack(latents: Tensor) -> Tensor:
    """Tokens `[N, H/2 · W/2, 4 C]`, row by row, of latents `[N, C, H, W]`."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents `[N, C, H, W]` of tokens `[N, H/2 · W/2, 4 C]`.

    Args:
        tokens: as `pack` makes them.
        height, width: H and W.
    """
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH)), PATCH)
