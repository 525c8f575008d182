"""PEFT's LoRA, ``y = W x + B (A x)``, computed in the network's dtype from float32 master weights.

PEFT's layers rely on autocast. Without it they copy a bfloat16 network's activations to float32, multiply in float32, and
keep the copies for the backward pass. Here A and B, which are a thousand times smaller, are rounded instead. In linear layers
a single addmm computes the second product and adds it to ``W x``.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, addmm, nn
from torch.nn.functional import conv2d, linear

from fastnabla.models.lora_targets import target_layers

ADAPTER = "policy"


@dataclasses.dataclass(slots=True)
class LoraSwitches:
    """State shared by all LoRA layers of a network."""

    enabled: bool = True
    """False disables the adapters: the layers are the pretrained ones."""
    constant: bool = False
    """True detaches A and B: the adapters get no gradient and keep no activations for one."""


class _LoraLayer:
    """A PEFT layer with a single adapter, `ADAPTER`, of scale 1 and without dropout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.switches = LoraSwitches()
        self.copies: tuple[Tensor, Tensor] | None = None
        """A and B to compute with instead of the master weights: their copies in the network's dtype, or scaled. None to use
        the masters."""

    @property
    def is_on(self) -> bool:
        """Whether the adapter is enabled, by `switches` and by PEFT's own flag."""
        return self.switches.enabled and not self.disable_adapters

    def masters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The master weights A and B, float32."""
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of `x`."""
        down, up = self.copies or self.masters()
        if self.switches.constant:
            down, up = down.detach(), up.detach()
        return down.to(x.dtype), up.to(x.dtype)


class LoraLinear(_LoraLayer, lora.Linear):
    """A linear layer with a LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        """``W x + B (A x)`` `[…, out]` in the dtype of `x [… , in]`; ``W x`` while the adapter is disabled."""
        y = self.base_layer(x)
        if not self.is_on:
            return y
        down, up = self.factors(x)
        low = linear(x, down)
        return addmm(y.flatten(0, -2), low.flatten(0, -2), up.t()).view(y.shape)


class LoraConv2d(_LoraLayer, lora.Conv2d):
    """A 2-D convolution with a LoRA: A has the layer's kernel size, B is 1 × 1."""

    def forward(self, x: Tensor) -> Tensor:
        """``W x + B (A x)`` in the dtype of `x [N, in, H, W]`; ``W x`` while the adapter is disabled."""
        y = self.base_layer(x)
        if not self.is_on:
            return y
        down, up = self.factors(x)
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        low = conv2d(x, down, None, a.stride, a.padding, a.dilation, a.groups)
        return y + conv2d(low, up, groups=b.groups)


class Lora:
    """All LoRA layers of a network.

    Args:
        network: a network with the layers of `add_lora`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [module for module in network.modules() if isinstance(module, LoraLinear | LoraConv2d)]
        self.masters = [master for layer in self.layers for master in layer.masters()]
        """A and B of each layer, float32, in the order of the network's parameters."""
        self.switches = LoraSwitches()
        for layer in self.layers:
            layer.switches = self.switches
        self.one_graph = False
        """Whether the pretrained network is the same graph with B = 0, instead of the layers without their adapters."""
        self._enabled = True
        self._scale = 1.0
        self._copies: list[Tensor] = []
        self._values: list[Tensor] = []
        self._zeros: list[Tensor] = []

    def weights(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights that the layers of a network of type `dtype` compute with, in the order of `masters`.

        They are the masters themselves or, in half precision or with `one_graph`, copies that are leaves of the graph.
        Differentiate with respect to these. `backward` adds their gradients to the masters' `.grad`; the gradients of several
        passes in one `backward` are summed in `dtype`.

        Every pass of a `Policy` refreshes the copies. If you call the network directly, call `refresh` first.
        """
        if dtype not in (torch.bfloat16, torch.float16) and not self.one_graph:
            self._drop_copies()
            return self.masters
        if [(p.device, dtype) for p in self.masters] != [(p.device, p.dtype) for p in self._copies]:
            self._copies = [torch.empty_like(master, dtype=dtype).requires_grad_() for master in self.masters]
            self._zeros = [torch.zeros_like(copy).requires_grad_() for copy in self._copies[1::2]]
            self._values = [copy.data for copy in self._copies]
            for master, copy in zip(self.masters, self._copies, strict=True):
                copy.register_post_accumulate_grad_hook(functools.partial(_accumulate_into, master))
            self._use_weights()
            self.refresh(dtype)
        return self._copies

    def refresh(self, dtype: torch.dtype) -> None:
        """Update the copies from the masters, in a few launches for all layers instead of two for each.

        This happens before every pass, because changes of the masters cannot be detected reliably: fused optimizers do not
        increase autograd's version counters. The copies are written without increasing theirs, so that a graph that has yet to
        be differentiated stays valid; its values are unchanged, since the masters do not change between the passes of a step.
        """
        if self.weights(dtype) is not self.masters:
            torch._foreach_copy_(self._values, [master.detach() for master in self.masters])
        if self._scale != 1:
            self._use_weights()

    def _drop_copies(self) -> None:
        if self._copies:
            self._copies = []
            self._use_weights()

    def enable(self, enabled: bool) -> None:
        """Switch between the finetuned network and the pretrained one."""
        self._enabled = enabled
        if self.one_graph:
            self._use_weights()
        else:
            self.switches.enabled = enabled

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within the context, every layer computes ``W x + scale B (A x)``, with gradients to match.

        0 gives the outputs of the pretrained network and 1 those of the finetuned one, to the bit. Other values interpolate
        between the two or extrapolate. A context within another replaces its scale.

        Args:
            scale: PEFT's scaling, as in ``pipeline.set_adapters(name, scale)``.

        Raises:
            ValueError: the scale is not finite.
        """
        if not math.isfinite(scale):
            raise ValueError(f"LoRA scale = {scale}: must be finite, such as 0.5.")
        outer = self._scale
        self._scale = scale
        self._use_weights()
        try:
            yield
        finally:
            self._scale = outer
            self._use_weights()

    def _use_weights(self) -> None:
        """Give every layer the A and B that it computes with."""
        weights = self._copies or self.masters
        ups = weights[1::2]
        if self._copies and self.one_graph and not self._enabled:
            ups = self._zeros
        elif self._scale != 1:
            with torch.enable_grad():
                ups = torch._foreach_mul(ups, self._scale)
        plain = weights is self.masters and self._scale == 1
        for layer, down, up in zip(self.layers, weights[::2], ups, strict=True):
            layer.copies = None if plain else (down, up)


def _accumulate_into(master: nn.Parameter, copy: Tensor) -> None:
    gradient = copy.grad.to(master.dtype)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    copy.grad = None


def add_lora(network: nn.Module, rank: int, targets: Sequence[str]) -> Lora:
    """Add a LoRA to the layers of `network` that `targets` names, with A random and B zero, float32, trainable.

    Raises:
        ValueError: see `fastnabla.models.lora_targets.target_layers`.
    """
    # An exact pattern: in a list of names, PEFT would take each as the end of longer names too.
    exactly = "|".join(map(re.escape, target_layers(network, targets)))
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=exactly)
    config._register_custom_module({nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d})
    network.add_adapter(config, adapter_name=ADAPTER)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return Lora(network)
