"""Images in [0, 1] to what the scorers' image towers were trained on, differentiably.

All take `images [B, 3, H, W]` and return pixel values `[B, 3, size, size]`, normalised by CLIP's mean and standard
deviation, in the images' dtype.

Bicubic resizing with antialias is PIL's, but for rounding to 8 bits and for overshoot at edges: PIL cuts that off at 0
and 1, where it would cut off the gradient too; here it stays, as in the scorers' own code for tensors.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its standard deviation, by channel."""
    mean, std = (
        torch.tensor(c, dtype=images.dtype, device=images.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD)
    )
    return (images - mean) / std


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias."""
    if images.shape[-2:] == (height, width):
        return images
    return _bicubic(images, height, width, antialias=True)


def crop_short_side(images: Tensor, size: int) -> Tensor:
    """Resize the short side to `size`, keeping the aspect, and crop the centre: torchvision's and CLIP's way."""
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resize(images, int(size * height / short), int(size * width / short))
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return normalise(images[..., top : top + size, left : left + size])


def pad_long_side(images: Tensor, size: int) -> Tensor:
    """Resize the long side to `size`, keeping the aspect, and pad with black to the square: HPSv2's way.

    HPSv2 itself leaves an image alone whose long side is `size` already, and then fails if it is not square; here it is
    padded too.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resize(images, round(height * scale), round(width * scale))
    below, right = (size - side for side in images.shape[-2:])
    return normalise(F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2)))


def squash(images: Tensor, size: int) -> Tensor:
    """Resize to the square whatever the aspect, without antialias: the aesthetic scorer of nabla-gfn.

    Without antialias each pixel depends on 4 × 4 of the image's, however much it shrinks: these are weighted unevenly,
    finer detail is folded into coarser, and beyond a factor of 4 some pixels have no gradient at all.
    """
    return normalise(_bicubic(images, size, size, antialias=False))


def _bicubic(images: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    if images.is_cuda and torch.are_deterministic_algorithms_enabled():  # the backward pass of interpolate is not
        return bicubic_by_matrices(images, height, width, antialias)
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=antialias)


def bicubic_by_matrices(images: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    """`F.interpolate` as two matrix products, in float64, which neither TF32 nor autocast reaches."""
    rows = _matrix(images.shape[-2], height, antialias, images.device)
    columns = _matrix(images.shape[-1], width, antialias, images.device)
    return (rows @ images.double() @ columns.T).to(images.dtype)


@functools.lru_cache(maxsize=16)
def _matrix(before: int, after: int, antialias: bool, device: torch.device) -> Tensor:
    """Weights `[after, before]` float64: what becomes of the columns of an identity matrix."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(before, dtype=torch.float64)[None, None]
        shape = (after, before)
        resized = F.interpolate(identity, shape, mode="bicubic", align_corners=False, antialias=antialias)
        return resized[0, 0].to(device)
