"""The probe "pixels": small images instead of a network's features."""

import torch.nn.functional as F
from torch import Tensor

SIDE = 8


class PixelProbe:
    """Averages the pixels in 8 × 8 fields.

    Its features show colours, ground and coarse shape. No reward uses them, and nothing in them is learned. They do not show
    what an image depicts: an object that moves by a field counts as much as another object.
    """

    def features(self, images: Tensor) -> Tensor:
        """Features `[B, 192]` in [0, 1] of images `[B, 3, H, W]` of any size: 4 × 4 pixels a field at 32 × 32 pixels."""
        return F.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)
