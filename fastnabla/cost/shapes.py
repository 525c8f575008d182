"""The networks of a configuration without their weights, to estimate a run's cost before anything is loaded."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnabla.config.train import TrainConfig
from fastnabla.models.fitting import checked_configurations
from fastnabla.models.flow import build_flow
from fastnabla.models.image_size import latent_shape, vae_factor
from fastnabla.models.lora import add_lora
from fastnabla.models.model_config import loading, text_width, vae_dtype

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
    sample_shape: tuple[int, int, int]
    """(C, H, W) of the latents."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images, in pixels."""
        factor = vae_factor(self.vae.config)
        return self.sample_shape[1] * factor, self.sample_shape[2] * factor


def shapes_of(config: TrainConfig) -> Shapes:
    """The networks of `config`, from the pipeline's configuration files alone.

    Raises:
        ValueError: the files cannot be read, or the pipeline's parts do not fit each other.
    """
    dtype = getattr(torch, config.model.dtype)
    unet_config, vae_config = checked_configurations(config.model)
    with torch.device("meta"):
        with loading(config.model):
            unet = UNet2DConditionModel.from_config(unet_config).to(dtype).requires_grad_(False)
            vae = AutoencoderKL.from_config(vae_config).requires_grad_(False)
        vae.to(vae_dtype(config.model, unet.config, vae.config))
        kind = config.flow.kind if config.has_flow else "none"
        flow = build_flow(kind, unet.config.in_channels, text_width(unet.config), seed=0)
    if config.lora.rank:
        add_lora(unet, config.lora.rank, config.lora.targets)
    else:
        unet.float().requires_grad_()
    return Shapes(unet, vae, flow, dtype, latent_shape(config.model, unet.config, vae.config))


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
