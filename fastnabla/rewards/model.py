"""The base class of network rewards: frozen weights, precision, gradients and memory."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastnabla.rewards.options import DEFAULTS, RewardOptions
from fastnabla.rewards.precision import computing_in, precision_on, score_in
from fastnabla.rewards.text import PromptCache


class RewardModel(nn.Module, abc.ABC):
    """A frozen network as a reward: always in eval mode, and differentiable with respect to the images only.

    It computes in `RewardOptions.precision`, whatever the policy's precision. Its weights are float32 unless you convert
    them. Prompts are encoded in float32. Each call supports one backward pass.

    Args:
        preprocess: differentiable map from images `[B, 3, H, W]` in [0, 1] to the pixel values that `score` takes.
        options: `checkpoint` and `precision` apply here.
        networks: submodules by name; they are frozen and converted to float32.
    """

    image_networks: ClassVar[tuple[str, ...]] = ()
    """Submodules that `score` runs and `encode_prompt` does not. With precision "bf16" the linear layers of their
    transformer layers are stored in bfloat16. That gives the same numbers as casting them in each call, in half the
    memory."""

    def __init__(
        self, preprocess: Callable[[Tensor], Tensor], options: RewardOptions = DEFAULTS, **networks: nn.Module
    ) -> None:
        super().__init__()
        self.preprocess, self.precision = preprocess, options.precision
        self.prompt_cache = PromptCache(self._encode_in_float32)
        for name, network in networks.items():
            self.add_module(name, network.float().requires_grad_(False))
            if options.checkpoint:
                checkpoint_layers(network)
        if options.precision == "bf16":
            for name in self.image_networks:
                halve_layers(self.get_submodule(name))
        self.eval()

    @abc.abstractmethod
    def score(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards `[B]` of preprocessed images `[B, 3, S, S]` and B prompts."""

    def encode_prompt(self, prompt: str) -> Tensor:
        """Compute what depends on the prompt only; `prompt_cache` stores it."""
        raise NotImplementedError

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards `[B]`.

        Args:
            images: `[B, 3, H, W]` in [0, 1], of any size and floating dtype.
            prompts: B prompts.

        Raises:
            ValueError: the images have another shape, or the number of prompts is not B.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"a reward takes images [B, 3, H, W] and B prompts, not {tuple(images.shape)} and {len(prompts)}."
            )
        images = images.to(next((parameter.dtype for parameter in self.parameters()), torch.float32))
        precision = precision_on(images.device, self.precision)
        return score_in(precision, lambda x: self.score(self.preprocess(x), prompts), images)

    def _encode_in_float32(self, prompt: str) -> Tensor:
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        with computing_in("float32", device):
            return self.encode_prompt(prompt)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a reward is not trained, and dropout would make it noisy."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.prompt_cache.results.clear()  # they have the previous device and dtype
        return super()._apply(*args, **kwargs)


def checkpoint_layers(network: nn.Module) -> None:
    """Recompute each transformer layer of `network` in the backward pass, also in eval mode.

    transformers' own switch works in training mode only, which enables dropout. So the `forward` of each layer that it
    would checkpoint is wrapped instead. The random state is not restored: nothing draws random numbers in eval mode.
    """
    for layer in transformer_layers(network):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def halve_layers(network: nn.Module) -> None:
    """Store the linear layers of `network`'s transformer layers in bfloat16, for autocast."""
    for layer in transformer_layers(network):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()


def transformer_layers(network: nn.Module) -> list[nn.Module]:
    """The layers that transformers would checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in network.modules() if isinstance(layer, GradientCheckpointingLayer)]
