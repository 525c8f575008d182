"""What all network rewards share: frozen weights, precision, gradients, memory."""

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
    """A frozen network as a reward: always in eval mode, differentiable in the images alone.

    It computes in `RewardOptions.precision`, whatever the policy runs in; its weights are float32 unless you convert it.
    Prompts are encoded in float32. One backward pass can be taken through each call's result.

    Args:
        preprocess: images `[B, 3, H, W]` in [0, 1] to the pixel values that `score` takes; differentiable.
        options: of which `checkpoint` and `precision` matter here.
        networks: become submodules of these names, frozen, in float32.
    """

    image_networks: ClassVar[tuple[str, ...]] = ()
    """Submodules that only `score` runs, not `encode_prompt`. With precision "bf16" the linear layers of their transformer
    layers are kept in bfloat16: the numbers are those that autocast would make of them in each call, in half the memory."""

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
        """What a prompt alone determines; `prompt_cache` keeps it."""
        raise NotImplementedError

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards `[B]`.

        Args:
            images: `[B, 3, H, W]` in [0, 1], of any size and floating dtype.
            prompts: B prompts.

        Raises:
            ValueError: the shape or the number of prompts is wrong.
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
        """Stays in eval mode: a reward is not trained, and dropout would make it noise."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.prompt_cache.results.clear()  # of the former device and dtype
        return super()._apply(*args, **kwargs)


def checkpoint_layers(network: nn.Module) -> None:
    """Recompute each transformer layer of `network` in the backward pass, in eval mode too.

    transformers' own switch works only in training mode, where dropout would be on. So each layer that it would
    checkpoint gets a `forward` of its own. Random numbers are not restored: nothing draws any in eval mode.
    """
    for layer in transformer_layers(network):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def halve_layers(network: nn.Module) -> None:
    """Keep the linear layers of `network`'s transformer layers in bfloat16, for autocast."""
    for layer in transformer_layers(network):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()


def transformer_layers(network: nn.Module) -> list[nn.Module]:
    """The layers that transformers would checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in network.modules() if isinstance(layer, GradientCheckpointingLayer)]
