"""Differentiable preprocessing: images in [0, 1] to the pixel values that the scorers were trained on.

All functions take `images [B, 3, H, W]` and return pixel values `[B, 3, size, size]` in the images' dtype, normalised by
CLIP's mean and standard deviation.

Bicubic resizing with antialiasing matches PIL's, with two differences. Results are not rounded to 8 bits. Overshoot at
edges is kept, as in the scorers' own code for tensors: PIL clips it to [0, 1], which would also remove the gradient.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its standard deviation, per channel."""
    mean, std = (
        torch.tensor(c, dtype=images.dtype, device=images.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD)
    )
    return (images - mean) / std


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resizing with antialiasing."""
    if images.shape[-2:] == (height, width):
        return images
    return _bicubic(images, height, width, antialias=True)


def crop_short_side(images: Tensor, size: int) -> Tensor:
    """Resize the short side to `size`, keep the aspect ratio, and crop the centre, as torchvision and CLIP do."""
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resize(images, int(size * height / short), int(size * width / short))
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return normalise(images[..., top : top + size, left : left + size])


def pad_long_side(images: Tensor, size: int) -> Tensor:
    """Resize the long side to `size`, keep the aspect ratio, and pad with black to a square, as HPSv2 does.

    HPSv2 itself does not pad an image whose long side is already `size`, and then fails if it is not square. Here it is
    padded too.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resize(images, round(height * scale), round(width * scale))
    below, right = (size - side for side in images.shape[-2:])
    return normalise(F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2)))


def squash(images: Tensor, size: int) -> Tensor:
    """Resize to a square whatever the aspect ratio, without antialiasing, as nabla-gfn's aesthetic scorer does.

    Without antialiasing each output pixel depends on only 4 × 4 input pixels. When an image shrinks, detail aliases, input
    pixels get uneven weights, and beyond a factor of 4 some have no gradient at all.
    """
    return normalise(_bicubic(images, size, size, antialias=False))


def _bicubic(images: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    if images.is_cuda and torch.are_deterministic_algorithms_enabled():  # interpolate's backward pass is not
        return bicubic_by_matrices(images, height, width, antialias)
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=antialias)


def bicubic_by_matrices(images: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    """`F.interpolate` as two matrix products, in float64, which neither TF32 nor autocast affects."""
    rows = _matrix(images.shape[-2], height, antialias, images.device)
    columns = _matrix(images.shape[-1], width, antialias, images.device)
    return (rows @ images.double() @ columns.T).to(images.dtype)


@functools.lru_cache(maxsize=16)
def _matrix(before: int, after: int, antialias: bool, device: torch.device) -> Tensor:
    """Interpolation weights `[after, before]`, float64: an identity matrix, resized along one axis."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(before, dtype=torch.float64)[None, None]
        shape = (after, before)
        resized = F.interpolate(identity, shape, mode="bicubic", align_corners=False, antialias=antialias)
        return resized[0, 0].to(device)
