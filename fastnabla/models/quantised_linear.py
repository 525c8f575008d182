"""Linear layers with frozen weights in 8 or 4 bits:

    y = Ŵ x + b,    ∂x = Ŵᵀ ∂y

The dequantised weights Ŵ exist only during a product, in the dtype of x. Nothing but the weights is rounded, so outputs and
gradients are those of a network that holds Ŵ. (bitsandbytes' Linear8bitLt also rounds the activations to 8 bits on a GPU. Its
gradient ignores that, and it keeps the activations.)

    int8: Ŵ_ij = q_ij s_i, with s_i = max_j |W_ij| / 127                            1 + 4 / in bytes a weight
    nf4:  Ŵ = NF4[q] s, with s the largest |W| of 64 consecutive weights             0.5625 bytes a weight

NF4 has 16 values, the quantiles of a normal distribution (QLoRA, arXiv 2305.14314); bitsandbytes packs and unpacks it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from fastnabla.utils.bitsandbytes import require_bitsandbytes

Kind = Literal["int8", "nf4"]
LARGEST_INT8 = 127
NF4_BLOCK = 64
"""Consecutive weights that share a scale."""


class QuantisedLinear(nn.Linear):
    """A frozen linear layer with quantised weights. It may be moved, but not cast: the scales stay float32.

    Args:
        layer: to quantise. Its bias is shared and stays as it is.
        kind: of quantisation. nf4 needs an even number of inputs.
    """

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        nn.Module.__init__(self)  # nn.Linear would create a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        codes, scales = quantise(layer.weight.detach(), kind)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """Ŵ `[out, in]`, dequantised anew. diffusers, transformers and PEFT ask for its dtype and device."""
        return dequantise(self.codes, self.scales, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``Ŵ x + b`` `[…, out]` in the dtype of `x [… , in]`."""
        return quantised_product(x, self.codes, self.scales, self.bias, False)


def quantise(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Quantise a matrix W `[out, in]`.

    Returns:
        The codes, int8 `[out, in]`, or for nf4 uint8 `[out, in / 2]`, two to a byte; and the float32 scales, `[out, 1]`, or for nf4
        `[⌈out · in / 64⌉]`.
    """
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
        return codes.view(len(weight), -1), state.absmax
    weight = weight.float()
    scales = weight.abs().amax(1, keepdim=True) / LARGEST_INT8
    # A row of zeros has scale 0.
    return (weight / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Ŵ `[out, in]` in `dtype` from the codes and scales of `quantise`."""
    if codes.dtype == torch.int8:
        return codes.to(dtype).mul_(scales)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    shape = torch.Size((len(codes), 2 * codes.shape[1]))
    state = QuantState(scales, shape, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
    return dequantize_4bit(codes.view(-1, 1), state)


# An operation of its own: a compiler that saw inside would keep Ŵ from the forward for the backward pass.
@torch.library.custom_op("fastnabla::quantised_product", mutates_args=())
def quantised_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``Ŵ x + b``, or if `transposed` ``Ŵᵀ x``, along the last dimension of `x`; differentiable in `x`, to any order.

    Equivalent torch: ``linear(x, W, bias)``, or ``x @ W``, with ``W = dequantise(codes, scales, x.dtype)``.

    Args:
        x: `[…, in]`, or `[…, out]` if `transposed`.
        codes, scales: of `quantise`.
        bias: `[out]`, constant; None if `transposed`.
        transposed: whether to multiply by Ŵᵀ.
    """
    weight = dequantise(codes, scales, x.dtype)
    return x @ weight if transposed else linear(x, weight, bias)


@quantised_product.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    inputs = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    return x.new_empty(*x.shape[:-1], inputs if transposed else codes.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, _, ctx.transposed = inputs
    ctx.save_for_backward(codes, scales)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    return quantised_product(gradient, codes, scales, None, not ctx.transposed), None, None, None, None


quantised_product.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.fastnabla.quantised_product)
def _flops(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * torch.Size(x).numel() * out_shape[-1]


def quantise_linear_layers(network: nn.Module, kind: Kind) -> None:
    """Replace the linear layers of `network` by quantised ones, one after the other. For nf4, layers with an odd number of
    inputs stay.

    The codes are a function of the weights alone, so each process and each resumed run has the same.

    Raises:
        ValueError: bitsandbytes is missing (nf4), or there is no linear layer.
    """
    if kind == "nf4":
        require_bitsandbytes(
            "model.quantise", kind, torch.cuda.is_available(), "Or use 'int8', which does not need it."
        )
    found = [
        (module, name)
        for module in network.modules()
        for name, layer in module.named_children()
        if isinstance(layer, nn.Linear) and not (kind == "nf4" and layer.in_features % 2)
    ]
    if not found:
        raise ValueError(
            f"model.quantise = {kind!r}: {type(network).__name__} has no linear layers, and only these are quantised; "
            "use 'none'."
        )
    for module, name in found:
        setattr(module, name, QuantisedLinear(getattr(module, name), kind))


def quantised_layers(network: nn.Module) -> list[QuantisedLinear]:
    """The quantised layers of `network`."""
    return [module for module in network.modules() if isinstance(module, QuantisedLinear)]


def weight_bytes(network: nn.Module) -> int:
    """Bytes of the parameters of `network` and of its quantised weights."""
    codes = [tensor for layer in quantised_layers(network) for tensor in (layer.codes, layer.scales)]
    return sum(tensor.nbytes for tensor in (*network.parameters(), *codes))


def dequantised_bytes(network: nn.Module) -> list[int]:
    """Bytes of Ŵ of each quantised layer of `network` during a product."""
    return [layer.in_features * layer.out_features * layer.dtype.itemsize for layer in quantised_layers(network)]
