"""Decodes latents to images and differentiates rewards through the VAE decoder.

The decoder's activations are by far the largest of a training step. In diffusers' implementation autograd keeps six of them
for each residual block: the input of every normalisation, SiLU and convolution. With frozen weights, the gradient with
respect to the latents needs only the inputs of the two normalisations: a convolution's backward pass does not need its
input, and a SiLU's input can be recomputed from the normalisation's. `AutoencoderKL` is decoded that way here
(`fastnabla.models.frozen_layers`). In channels-last on a GPU, a Triton kernel computes the normalisations
(`fastnabla.models.group_norm_silu`). For Stable Diffusion's decoder at 512² in bfloat16, this keeps 0.9 GiB per image instead
of 2.8, and recomputes only the normalisations.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

from fastnabla.distributed.beacon import BEACON
from fastnabla.models.compiling import compiled, pad_rows
from fastnabla.models.frozen_layers import convolve, memory_format, norm_silu, norm_silu_and_input
from fastnabla.models.group_norm_silu import PLAIN, GroupNormSiLU, select
from fastnabla.objective.gaussian import full
from fastnabla.objective.settings import Backend
from fastnabla.utils.tensor_bytes import LiveBytes

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]


def _resnet(block: ResnetBlock2D, x: Tensor, norm: GroupNormSiLU) -> Tensor:
    y, x = norm_silu_and_input(block.norm1, x, norm)
    y = convolve(block.conv1, y)
    y = norm_silu(block.norm2, y, norm)
    y = convolve(block.conv2, y)
    if block.conv_shortcut is not None:
        x = convolve(block.conv_shortcut, x)
    return x + y


def _middle(block: UNetMidBlock2D, x: Tensor, norm: GroupNormSiLU) -> Tensor:
    x = _resnet(block.resnets[0], x, norm)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            # Attention always returns channels-last, which would change the layout of everything after it.
            x = attention(x).contiguous(memory_format=memory_format(x))
        x = _resnet(resnet, x, norm)
    return x


def _up(block: UpDecoderBlock2D, x: Tensor, norm: GroupNormSiLU) -> Tensor:
    for resnet in block.resnets:
        x = _resnet(resnet, x, norm)
    for upsampler in block.upsamplers or ():
        x = convolve(upsampler.conv, functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    return x


def _decode_kl(vae: AutoencoderKL, latents: Tensor, checkpoint: bool, norm: GroupNormSiLU) -> Tensor:
    """`vae.decode(latents)`. The last block is never recomputed: the backward pass starts with it, so recomputing would not
    lower the peak. Without gradients nothing is recomputed."""
    decoder, run = vae.decoder, _call
    if checkpoint and latents.requires_grad:
        run = functools.partial(recompute, use_reentrant=False, preserve_rng_state=False)
    x = latents if vae.post_quant_conv is None else convolve(vae.post_quant_conv, latents)
    x = run(_middle, decoder.mid_block, convolve(decoder.conv_in, x), norm)
    *blocks, last = decoder.up_blocks
    for block in blocks:
        x = run(_up, block, x, norm)
    return convolve(decoder.conv_out, norm_silu(decoder.conv_norm_out, _up(last, x, norm), norm))


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _decode_tiny(vae: AutoencoderTiny, latents: Tensor, checkpoint: bool, norm: GroupNormSiLU) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def _decode_function(vae: nn.Module, checkpoint: bool) -> Callable[..., Tensor]:
    """The function that decodes with `vae`.

    Raises:
        ValueError: `vae` is not supported, or not with `checkpoint`.
    """
    if isinstance(vae, AutoencoderTiny):
        if checkpoint:
            raise ValueError(
                "checkpoint = True: AutoencoderTiny keeps few activations and does not support checkpointing; use False."
            )
        return _decode_tiny
    if isinstance(vae, AutoencoderKL):
        blocks = vae.decoder.up_blocks
        resnets = [resnet for block in (vae.decoder.mid_block, *blocks) for resnet in block.resnets]
        if all(isinstance(block, UpDecoderBlock2D) for block in blocks) and all(map(_is_plain, resnets)):
            return _decode_kl
    raise ValueError(
        f"vae: this {type(vae).__name__} cannot be decoded. Supported are AutoencoderTiny, and AutoencoderKL with a "
        "decoder of UpDecoderBlock2D and SiLU, as in Stable Diffusion."
    )


def _is_plain(resnet: nn.Module) -> bool:
    kinds = isinstance(resnet, ResnetBlock2D) and isinstance(resnet.nonlinearity, nn.SiLU)
    return kinds and resnet.time_emb_proj is None and resnet.output_scale_factor == 1


class Decoder(nn.Module):
    """A diffusers autoencoder's decoder with bounded memory.

    `AutoencoderKL` is decoded as described above; its own slicing, tiling and checkpointing settings are ignored.
    `AutoencoderTiny` (TAESD) is an approximation that costs a seventeenth of the arithmetic and a third of the memory. Its
    decoder first passes the latents through 3 tanh(z / 3), so its gradient vanishes where they leave ±3.

    Args:
        vae: the autoencoder, on the device that it will compute on; frozen in place.
        chunk: maximum number of images decoded at once; None for all.
        checkpoint: recompute all blocks of the decoder but the last in the backward pass instead of keeping their
            activations. For Stable Diffusion this lowers the peak by a quarter and adds a fifth to the arithmetic. A smaller
            `chunk` saves more and costs no arithmetic, until it is 1.
        compile: compile the decoder with torch.compile, one graph with gradients and one without. Fewer images than `chunk`
            are padded to `chunk`, so that no further graph is compiled.
        channels_last: keep weights and activations in NHWC order, which cuDNN's bfloat16 convolutions use. In NCHW,
            transposing their operands moves 9.6 GB per image for Stable Diffusion, forward and backward. With this setting
            7 MB are copied.
        backend: what computes the normalisations of a channels-last `AutoencoderKL`. "auto": the Triton kernel if it can run
            on the autoencoder's device; see `fastnabla.objective.backend.kernels_compute`. In NCHW it is always plain torch.

    Raises:
        ValueError: `vae` is not supported, or not with `checkpoint`, or `backend` is "triton" and the kernel cannot run.
    """

    def __init__(
        self,
        vae: nn.Module,
        chunk: int | None = None,
        checkpoint: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self._decode, self._norm = _decode_function(vae, checkpoint), PLAIN
        if channels_last and self._decode is _decode_kl:
            self._norm = select(backend, vae.device, vae.dtype)
        self._padded_to = 0
        if compile:
            self._decode, self._padded_to = compiled(self._decode), chunk or 0
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.vae = vae.requires_grad_(False).eval()
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):  # one by one, because Module.to does not accept fake parameters
                weight = module.weight.to(memory_format=self._memory_format)
                module.weight = nn.Parameter(weight, requires_grad=False)
        self.chunk = chunk
        self.checkpoint = checkpoint
        for name in ("latents_mean", "latents_std"):
            values = vae.config.get(name)
            values = None if values is None else torch.tensor(values, device=vae.device).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1], float32 (float64 if the autoencoder is), of the sampler's scaled `latents`
        `[N, C, h, w]`."""
        BEACON.advance()
        count = len(latents)
        (latents,) = pad_rows([latents], max(count, self._padded_to))
        latents = self._unscaled(latents)
        latents = latents.to(self.vae.dtype).contiguous(memory_format=self._memory_format)
        images = self._decode(self.vae, latents, self.checkpoint, self._norm)[:count].contiguous()
        return (full(images) / 2 + 0.5).clamp(0, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents, with its latents_mean and latents_std as in `StableDiffusionXLPipeline`."""
        config = self.vae.config
        if self.latents_mean is None or self.latents_std is None:
            return latents / config.scaling_factor + (config.shift_factor or 0)
        return latents * self.latents_std / config.scaling_factor + self.latents_mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """`forward` in chunks, without gradients."""
        return torch.cat([self(part) for part in latents.split(self.chunk or len(latents))])

    @torch.no_grad()
    def rewards(self, latents: Tensor, prompts: Sequence[str], reward: RewardFunction) -> Tensor:
        """Rewards `[N]` of the decoded `latents`, float32, in chunks, without gradients. Arguments as for
        `reward_gradient`."""
        size = self.chunk or len(latents)
        starts = range(0, len(latents), size)
        return torch.cat([reward(self(latents[i : i + size]), prompts[i : i + size]).float() for i in starts])

    def reward_gradient(self, latents: Tensor, prompts: Sequence[str], reward: RewardFunction) -> tuple[Tensor, Tensor]:
        """Rewards `[N]` of the decoded `latents`, and their gradients `[N, C, h, w]` with respect to the latents.

        Both are float32; rewards are float64 if `reward` returns float64, gradients if the latents are float64.

        Does not synchronise with the device unless the reward does.

        Args:
            latents: `[N, C, h, w]`; clean latents, or one-step predictions of them.
            prompts: the N prompts.
            reward: differentiable; maps images `[B, 3, H, W]` in [0, 1] and B prompts to rewards `[B]`.

        Raises:
            RuntimeError: the reward is not differentiable with respect to the images (from autograd).
        """
        rewards, gradients = [], []
        size = self.chunk or len(latents)
        for start in range(0, len(latents), size):
            part = full(latents[start : start + size]).detach().requires_grad_()
            with torch.enable_grad():
                values = reward(self(part), prompts[start : start + size])
                (gradient,) = torch.autograd.grad(values.sum(), part)
            rewards.append(full(values.detach()))
            gradients.append(gradient)
        return torch.cat(rewards), torch.cat(gradients).contiguous()


def with_empty_weights(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `network` with new, uninitialised, frozen parameters of type `dtype`."""
    empty = {id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def decode_bytes(
    vae: nn.Module, latent_shape: tuple[int, int, int], dtype: torch.dtype, checkpoint: bool = False
) -> int:
    """Peak bytes of one image's decode and backward pass, from shapes alone.

    Excluded are the weights, the reward network and the convolutions' workspace. The figure is for eager execution in plain
    torch in NCHW. The Triton kernel needs less; its sums by tile are 3% of the largest activation.

    Args:
        vae: the autoencoder; not modified, and nothing of its size is allocated.
        latent_shape: (C, h, w) of the latents.
        dtype: of the weights and the arithmetic.
        checkpoint: as for `Decoder`.
    """
    with FakeTensorMode():
        decoder = Decoder(with_empty_weights(vae, dtype), checkpoint=checkpoint)
        latents = torch.empty(1, *latent_shape)
        with LiveBytes() as memory:
            decoder.reward_gradient(latents, [""], lambda images, prompts: images.sum((1, 2, 3)))
    return memory.peak
