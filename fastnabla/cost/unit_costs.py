"""Arithmetic, memory and memory traffic of the networks' passes, from their shapes alone: nothing is computed."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastnabla.cost.shapes import TEXT_LENGTH, Shapes, pretended
from fastnabla.models.decoder import Decoder, decode_bytes
from fastnabla.models.model_config import is_xl, pooled_width
from fastnabla.utils.tensor_bytes import LiveBytes, MovedBytes


@dataclasses.dataclass(frozen=True, slots=True)
class PassBytes:
    """Memory of a pass with its backward passes, weights excepted."""

    kept: int
    """What the graph keeps between forward and backward."""
    peak: int
    """The most that is in use at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class PassTraffic:
    """Bytes that a pass reads and writes, weights and activations, as eager execution does; see `MovedBytes`."""

    forward: int
    backward: int


@dataclasses.dataclass(frozen=True, eq=False)
class UnitCosts:
    """Costs of one transition's guided rows in the UNet and in g_φ, and of one image.

    Operations are counted as matrix multiplications, convolutions and attention are: 2 for each multiply-add; bytes as
    eager execution allocates them, without what a kernel needs for itself.

    Args:
        shapes: the networks.
        guided: whether a transition has two rows, for classifier-free guidance.
    """

    shapes: Shapes
    guided: bool

    @property
    def trained_sizes(self) -> list[int]:
        """Elements of each trained tensor."""
        networks = [network for network in (self.shapes.unet, self.shapes.flow) if network is not None]
        return [p.numel() for network in networks for p in network.parameters() if p.requires_grad]

    @functools.cached_property
    def unet_flops(self) -> int:
        """U: one forward pass of the UNet. A backward pass to the input or to a LoRA costs as much, to 3%."""
        return _flops(lambda: self._unet("meta"))

    @functools.cached_property
    def decode_flops(self) -> int:
        """A decode and its backward pass to the latents."""
        decoder = Decoder(self.shapes.vae)

        def decode() -> None:
            latents = torch.empty(1, *self.shapes.sample_shape, device="meta", requires_grad=True)
            decoder(latents).sum().backward()

        return _flops(decode)

    @functools.cached_property
    def flow_flops(self) -> int:
        """One forward pass of g_φ; 0 without."""
        return _flops(lambda: self._flow("meta")) if self.shapes.flow is not None else 0

    @functools.cache  # noqa: B019 (lives as long as the plan it is made for)
    def unet_bytes(self, checkpoint: bool, transitions: int = 1) -> PassBytes:
        """The policy's pass at x: forward, to its input, to its parameters.

        Args:
            checkpoint: blocks are recomputed.
            transitions: in the pass.
        """
        unet = self.shapes.unet
        unet.enable_gradient_checkpointing() if checkpoint else unet.disable_gradient_checkpointing()
        try:
            with pretended(unet):
                return _pass_bytes(lambda: self._unet("cpu", transitions), unet)
        finally:
            unet.disable_gradient_checkpointing()

    @functools.cache  # noqa: B019
    def flow_bytes(self, rows: int = 1) -> PassBytes:
        """A pass of g_φ over `rows` states with its backward pass to the parameters."""
        flow = self.shapes.flow
        if flow is None:
            return PassBytes(0, 0)
        with pretended(flow), torch.autocast("cpu", torch.bfloat16, enabled=self.shapes.dtype != torch.float32):
            return _pass_bytes(lambda: self._flow("cpu", rows), flow)

    @functools.cache  # noqa: B019
    def decode_bytes(self, checkpoint: bool) -> int:
        """Peak of a decode with backward; see `fastnabla.models.decoder.decode_bytes`."""
        return decode_bytes(self.shapes.vae, self.shapes.sample_shape, self.shapes.vae.dtype, checkpoint)

    @functools.cache  # noqa: B019
    def unet_traffic(self, transitions: int) -> PassTraffic:
        """A forward pass of the UNet over `transitions`, and a backward pass to its input, nothing recomputed."""
        with pretended(self.shapes.unet):
            return _traffic(lambda: self._unet("cpu", transitions), [])

    @functools.cache  # noqa: B019
    def decode_traffic(self, images: int) -> PassTraffic:
        """A decode of `images` and its backward pass to the latents, nothing recomputed."""
        with pretended(self.shapes.vae):
            decoder = Decoder(self.shapes.vae)

            def decode() -> tuple[Tensor, Tensor]:
                latents = torch.empty(images, *self.shapes.sample_shape, requires_grad=True)
                return latents, decoder(latents)

            return _traffic(decode, [])

    @functools.cache  # noqa: B019
    def flow_traffic(self, rows: int) -> PassTraffic:
        """A pass of g_φ over `rows` states and its backward pass to the parameters; nothing without."""
        flow = self.shapes.flow
        if flow is None:
            return PassTraffic(0, 0)
        with pretended(flow), torch.autocast("cpu", torch.bfloat16, enabled=self.shapes.dtype != torch.float32):
            return _traffic(lambda: self._flow("cpu", rows), list(flow.parameters()))

    def _unet(self, device: str, transitions: int = 1) -> tuple[Tensor, Tensor]:
        rows = transitions * (2 if self.guided else 1)
        unet, dtype = self.shapes.unet, self.shapes.dtype
        x = torch.empty(rows, *self.shapes.sample_shape, device=device, dtype=dtype, requires_grad=True)
        text = torch.empty(rows, TEXT_LENGTH, unet.config.cross_attention_dim, device=device, dtype=dtype)
        timestep = torch.empty(rows, device=device)
        added = None
        if is_xl(unet.config):
            pooled, time_ids = (
                torch.empty(rows, width, device=device, dtype=unet.dtype) for width in (pooled_width(unet.config), 6)
            )
            added = {"text_embeds": pooled, "time_ids": time_ids}
        with torch.autocast("cpu", dtype, enabled=device == "cpu" and unet.dtype != dtype):
            arguments = {"encoder_hidden_states": text.to(unet.dtype), "added_cond_kwargs": added}
            return x, unet(x.to(unet.dtype), timestep, **arguments, return_dict=False)[0]

    def _flow(self, device: str, rows: int = 1) -> tuple[Tensor, Tensor]:
        x = torch.empty(rows, *self.shapes.sample_shape, device=device)
        text = torch.empty(rows, TEXT_LENGTH, self.shapes.unet.config.cross_attention_dim, device=device)
        return x, self.shapes.flow(x, torch.empty(rows, device=device), text)


def _flops(compute: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def _pass_bytes(compute: Callable[[], tuple[Tensor, Tensor]], network: nn.Module) -> PassBytes:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with LiveBytes() as memory:
        x, output = compute()
        kept = memory.live
        if x.requires_grad:
            torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True)
        torch.autograd.grad(output, parameters, torch.ones_like(output))
    return PassBytes(kept, memory.peak)


def _traffic(compute: Callable[[], tuple[Tensor, Tensor]], parameters: list[nn.Parameter]) -> PassTraffic:
    """Of `compute`, which returns input and output, and of the output's gradient in `parameters`, or else in the input."""
    with MovedBytes() as moved:
        x, output = compute()
        forward = moved.total
        torch.autograd.grad(output, parameters or x, torch.ones_like(output))
    return PassTraffic(forward, moved.total - forward)
