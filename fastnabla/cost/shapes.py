"""The networks of a configuration without their weights, to estimate a run's cost before anything is loaded."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnabla.config.train import TrainConfig
from fastnabla.models.flow import build_flow
from fastnabla.models.lora import add_lora
from fastnabla.models.model_config import configurations, vae_dtype

TEXT_LENGTH = 77
"""Tokens of a prompt for Stable Diffusion's text encoders."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shapes:
    """Networks on the meta device, in their compute dtype; the LoRA and g_φ are float32."""

    unet: UNet2DConditionModel
    """With its LoRA, or with all parameters trainable and float32."""
    vae: AutoencoderKL
    flow: nn.Module | None
    dtype: torch.dtype

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        return self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size

    @property
    def pixels(self) -> int:
        """Height and width of the images."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)


def shapes_of(config: TrainConfig) -> Shapes:
    """The networks of `config`, from the pipeline's configuration files alone.

    Raises:
        ValueError: the files cannot be read.
    """
    dtype = getattr(torch, config.model.dtype)
    unet_config, vae_config = configurations(config.model)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config).to(dtype).requires_grad_(False)
        vae = AutoencoderKL.from_config(vae_config).requires_grad_(False)
        vae.to(vae_dtype(config.model, unet.config, vae.config))
        kind = config.flow.kind if config.has_flow else "none"
        flow = build_flow(kind, unet.config.in_channels, unet.config.cross_attention_dim, seed=0)
    if config.lora.rank:
        add_lora(unet, config.lora.rank, config.lora.targets)
    else:
        unet.float().requires_grad_()
    return Shapes(unet, vae, flow, dtype)


@contextlib.contextmanager
def fake_weights(*networks: nn.Module) -> Iterator[None]:
    """Within the context, the weights of `networks`, which are on the meta device, are fake CPU tensors, and so are all new
    tensors.

    Operations are then dispatched as in a real run (for example, to attention that does not keep its attention matrix), but
    nothing is computed.
    """
    before = [
        (table, dict(table))
        for network in networks
        for module in network.modules()
        for table in (module._parameters, module._buffers)
    ]
    with FakeTensorMode():
        try:
            for table, tensors in before:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        table[name] = _fake_copy(tensor)
            yield
        finally:
            for table, tensors in before:
                table.update(tensors)


def _fake_copy(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake
