"""The ground's luminance on tinted silhouettes, whose grounds are known."""

import torch

from fastnabla.metrics.ground import ground_luminance, is_dark
from fastnabla.testbed.silhouettes import load_masks, tint


def test_grounds_of_silhouettes_are_told_apart() -> None:
    """Masks are padded by at least 2 pixels, so the corner shows the ground, which is grey."""
    images = tint(load_masks("test")[0], torch.Generator().manual_seed(0))
    luminance = ground_luminance(images)
    torch.testing.assert_close(luminance, images[:, 0, 0, 0], atol=1e-6, rtol=0)
    assert 400 < is_dark(images).sum() < 600  # of 1000 at even odds: 16 is a standard deviation
    assert torch.equal(is_dark(images), images[:, 1, 0, 0] < 0.5)


def test_an_animal_at_the_border_is_not_the_ground() -> None:
    images = torch.full((1, 3, 32, 32), 0.9)
    images[:, :, 10:, 5:25] = 0.1  # touches a third of the lower edge's and a sixth of all border pixels
    assert not is_dark(images).item()
    images[:, :, :, 2:31] = 0.1  # three quarters of two edges
    images[:, :, 3:31] = 0.1
    assert is_dark(images).item()


def test_luminance_weighs_colours() -> None:
    plain = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8)
    torch.testing.assert_close(ground_luminance(plain), torch.tensor([0.2126, 0.7152, 0.0722]))
