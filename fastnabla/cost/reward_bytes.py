"""Memory that the published rewards take, from their architectures alone: nothing is loaded or computed."""

import dataclasses

import torch

from fastnabla.config.sections import RewardConfig
from fastnabla.cost.shapes import pretended
from fastnabla.rewards import PUBLISHED, RewardOptions, parse_term, published_class
from fastnabla.rewards.model import RewardModel
from fastnabla.utils.tensor_bytes import LiveBytes

PROMPT = "a photo of an astronaut riding a horse on the moon"


@dataclasses.dataclass(frozen=True, slots=True)
class RewardBytes:
    """Of a sum of rewards."""

    weights: int
    image: int
    """Peak of an image's forward and backward pass, weights and decoder excepted."""


def reward_bytes(config: RewardConfig, pixels: int) -> RewardBytes:
    """Bytes of the published rewards among `config.terms`, whose graphs are alive together; a reward of your own is not
    known before it is built, and the testbed's are small.

    Args:
        config: the terms, how they preprocess, whether they recompute, and in what precision.
        pixels: height and width of the images.
    """
    options = RewardOptions(
        preprocess=config.preprocess, checkpoint=config.checkpoint, precision=config.precision, random_init=True
    )
    names = [name for name, _ in map(parse_term, config.terms) if name in PUBLISHED]
    rewards = [published_class(name).build(torch.device("meta"), options) for name in names]
    weights = sum(p.numel() * p.element_size() for reward in rewards for p in reward.parameters())
    return RewardBytes(weights, sum(image_bytes(reward, pixels) for reward in rewards))


def image_bytes(reward: RewardModel, pixels: int, prompt: str = PROMPT) -> int:
    """Peak of `reward`'s forward and backward pass over one image, whose prompt is encoded already if that is done once.

    Args:
        reward: of the meta device; it is of no use afterwards.
        pixels: height and width of the image.
        prompt: which, for those that read it with every image.
    """
    with pretended(reward):
        images = torch.empty(1, 3, pixels, pixels, requires_grad=True)
        reward(images, [prompt])
        with LiveBytes() as memory:
            torch.autograd.grad(reward(images, [prompt]).sum(), images)
    return memory.peak
