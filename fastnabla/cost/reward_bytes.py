"""Memory of the published rewards, from their architectures alone; nothing is loaded or computed."""

import dataclasses

import torch

from fastnabla.config.model_sections import RewardConfig
from fastnabla.cost.shapes import fake_weights
from fastnabla.rewards import PUBLISHED, RewardOptions, parse_term, published_class
from fastnabla.rewards.model import RewardModel
from fastnabla.utils.tensor_bytes import LiveBytes

PROMPT = "a photo of an astronaut riding a horse on the moon"


@dataclasses.dataclass(frozen=True, slots=True)
class RewardBytes:
    """Bytes of a sum of rewards."""

    weights: int
    image: int
    """Peak of an image's forward and backward pass, without the weights and the decoder."""


def reward_bytes(config: RewardConfig, size: tuple[int, int]) -> RewardBytes:
    """Bytes of the published rewards among `config.terms`, whose graphs are alive at the same time.

    Custom rewards are not counted, since their size is unknown until they are built, nor are the testbed's, which are small.

    Args:
        config: the terms, their preprocessing, checkpointing and precision.
        size: (H, W) of the images, in pixels.
    """
    options = RewardOptions(
        preprocess=config.preprocess, checkpoint=config.checkpoint, precision=config.precision, random_init=True
    )
    names = [name for name, _ in map(parse_term, config.terms) if name in PUBLISHED]
    rewards = [published_class(name).build(torch.device("meta"), options) for name in names]
    weights = sum(p.numel() * p.element_size() for reward in rewards for p in reward.parameters())
    return RewardBytes(weights, sum(image_bytes(reward, size) for reward in rewards))


def image_bytes(reward: RewardModel, size: tuple[int, int], prompt: str = PROMPT) -> int:
    """Peak bytes of `reward`'s forward and backward pass over one image. If the reward caches encoded prompts, encoding is
    not included.

    Args:
        reward: on the meta device; unusable afterwards.
        size: (H, W) of the image, in pixels.
        prompt: for rewards that process the prompt with every image.
    """
    with fake_weights(reward):
        images = torch.empty(1, 3, *size, requires_grad=True)
        reward(images, [prompt])
        with LiveBytes() as memory:
            torch.autograd.grad(reward(images, [prompt]).sum(), images)
    return memory.peak
