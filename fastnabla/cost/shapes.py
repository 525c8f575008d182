"""The networks of a configuration without their weights, to estimate a run's cost before anything is loaded."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnabla.config.train import TrainConfig
from fastnabla.models.description import Description, loading
from fastnabla.models.fitting import checked_description
from fastnabla.models.flow import build_flow
from fastnabla.models.image_size import latent_shape, vae_factor
from fastnabla.models.lora import add_lora
from fastnabla.models.quantised_linear import quantise_linear_layers


@dataclasses.dataclass(frozen=True, slots=True)
class Shapes:
    """Networks on the meta device, in their compute dtype; the LoRA and g_φ are float32."""

    network: nn.Module
    """The finetuned one, perhaps quantised, with its LoRA, or with all parameters trainable and float32."""
    vae: AutoencoderKL
    flow: nn.Module | None
    dtype: torch.dtype
    description: Description
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
    dtype, description = getattr(torch, config.model.dtype), checked_description(config.model)
    family = description.family
    with torch.device("meta"):
        with loading(config.model):
            network = family.network_class.from_config(description.network).to(dtype).requires_grad_(False)
            vae = AutoencoderKL.from_config(description.vae).requires_grad_(False)
        vae.to(description.vae_dtype(config.model))
        kind, width = config.flow.kind if config.has_flow else "none", description.embedding_shapes["text"][-1]
        flow = build_flow(kind, family.channels(network.config), width, seed=0)
    if config.model.quantise != "none":
        quantise_linear_layers(network, config.model.quantise)
    if config.lora.rank:
        add_lora(network, config.lora.rank, config.lora.targets)
    else:
        network.float().requires_grad_()
    return Shapes(network, vae, flow, dtype, description, latent_shape(config.model, description))


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
