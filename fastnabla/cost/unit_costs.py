"""Arithmetic, memory and memory traffic of the networks' passes, from shapes alone; nothing is computed."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastnabla.cost.shapes import Shapes, fake_weights
from fastnabla.models.decoder import Decoder, decode_bytes
from fastnabla.models.quantised_linear import dequantised_bytes
from fastnabla.utils.row_bytes import ROWS, LiveRowBytes, MovedRowBytes


@dataclasses.dataclass(frozen=True, slots=True)
class PassBytes:
    """Bytes of a forward pass and its backward passes, without the weights."""

    kept: int
    """What the graph keeps between forward and backward."""
    peak: int
    """The maximum in use at any time."""


@dataclasses.dataclass(frozen=True, slots=True)
class PassTraffic:
    """Bytes of weights and activations that a pass reads and writes in eager execution; see `MovedBytes`."""

    forward: int
    backward: int


@dataclasses.dataclass(frozen=True, eq=False)
class UnitCosts:
    """Costs of a transition in the UNet and in g_φ, and of an image in the decoder.

    FLOP are those of matrix multiplications, convolutions and attention, 2 for each multiply-add. Bytes are those that eager
    execution allocates, without kernels' workspace.

    Args:
        shapes: the networks.
        guided: whether a transition has two rows, for classifier-free guidance.
    """

    shapes: Shapes
    guided: bool

    @property
    def trained_sizes(self) -> list[int]:
        """Number of elements of each trained tensor."""
        networks = [network for network in (self.shapes.network, self.shapes.flow) if network is not None]
        return [p.numel() for network in networks for p in network.parameters() if p.requires_grad]

    @functools.cached_property
    def network_flops(self) -> int:
        """FLOP of one forward pass of the UNet, the unit U. A backward pass to the input or to a LoRA costs the same to
        within 3%."""
        return _flops(lambda: self._network("meta"))

    @functools.cached_property
    def decode_flops(self) -> int:
        """FLOP of a decode and its backward pass to the latents."""
        decoder = Decoder(self.shapes.vae)

        def decode() -> None:
            latents = torch.empty(1, *self.shapes.sample_shape, device="meta", requires_grad=True)
            decoder(latents).sum().backward()

        return _flops(decode)

    @functools.cached_property
    def flow_flops(self) -> int:
        """FLOP of one forward pass of g_φ; 0 without g_φ."""
        return _flops(lambda: self._flow("meta")) if self.shapes.flow is not None else 0

    def network_bytes(self, checkpoint: bool, transitions: int = 1) -> PassBytes:
        """A forward pass of the policy, with backward passes to its input and its parameters.

        Args:
            checkpoint: whether blocks are recomputed.
            transitions: number of transitions in the pass.
        """
        counted = self._network_pass(checkpoint)(transitions)
        # The weights that a product dequantises are within an operation, so they are not counted.
        return PassBytes(counted.kept, counted.peak + max(self._dequantised, default=0))

    def flow_bytes(self, rows: int = 1) -> PassBytes:
        """A forward pass of g_φ over `rows` states, with a backward pass to its parameters."""
        return self._flow_pass(rows) if self.shapes.flow is not None else PassBytes(0, 0)

    @functools.cache  # noqa: B019
    def decode_bytes(self, checkpoint: bool) -> int:
        """Peak bytes of a decode and its backward pass; see `fastnabla.models.decoder.decode_bytes`."""
        return decode_bytes(self.shapes.vae, self.shapes.sample_shape, self.shapes.vae.dtype, checkpoint)

    def network_traffic(self, transitions: int) -> PassTraffic:
        """A forward pass of the UNet over `transitions` and a backward pass to its input, without recomputation."""
        counted = self._network_traffic(transitions)
        dequantised = 2 * sum(self._dequantised)  # written and read within an operation
        return PassTraffic(counted.forward + dequantised, counted.backward + dequantised)

    def decode_traffic(self, images: int) -> PassTraffic:
        """A decode of `images` and its backward pass to the latents, without recomputation."""
        return self._decode_traffic(images)

    def flow_traffic(self, rows: int) -> PassTraffic:
        """A forward pass of g_φ over `rows` states and a backward pass to its parameters; 0 without g_φ."""
        return self._flow_traffic(rows) if self.shapes.flow is not None else PassTraffic(0, 0)

    @functools.cached_property
    def _dequantised(self) -> list[int]:
        return dequantised_bytes(self.shapes.network)

    @functools.cache  # noqa: B019 (the instance lives as long as the plan)
    def _network_pass(self, checkpoint: bool) -> Callable[[int], PassBytes]:
        network = self.shapes.network
        network.enable_gradient_checkpointing() if checkpoint else network.disable_gradient_checkpointing()
        try:
            with fake_weights(network):
                return _pass_bytes(lambda: self._network("cpu", ROWS), network)
        finally:
            network.disable_gradient_checkpointing()

    @functools.cached_property
    def _network_traffic(self) -> Callable[[int], PassTraffic]:
        with fake_weights(self.shapes.network):
            return _traffic(lambda: self._network("cpu", ROWS), [])

    @functools.cached_property
    def _flow_pass(self) -> Callable[[int], PassBytes]:
        flow = self.shapes.flow
        with fake_weights(flow), torch.autocast("cpu", torch.bfloat16, enabled=self.shapes.dtype != torch.float32):
            return _pass_bytes(lambda: self._flow("cpu", ROWS), flow)

    @functools.cached_property
    def _flow_traffic(self) -> Callable[[int], PassTraffic]:
        flow = self.shapes.flow
        with fake_weights(flow), torch.autocast("cpu", torch.bfloat16, enabled=self.shapes.dtype != torch.float32):
            return _traffic(lambda: self._flow("cpu", ROWS), list(flow.parameters()))

    @functools.cached_property
    def _decode_traffic(self) -> Callable[[int], PassTraffic]:
        with fake_weights(self.shapes.vae):
            decoder = Decoder(self.shapes.vae)

            def decode() -> tuple[Tensor, Tensor]:
                latents = torch.empty(ROWS, *self.shapes.sample_shape, requires_grad=True)
                return latents, decoder(latents)

            return _traffic(decode, [])

    def _network(self, device: str, transitions: int = 1) -> tuple[Tensor, Tensor]:
        rows = transitions * (2 if self.guided else 1)
        network, dtype, family = self.shapes.network, self.shapes.dtype, self.shapes.description.family
        x = torch.empty(rows, *self.shapes.sample_shape, device=device, dtype=dtype, requires_grad=True)
        shared = family.size_input(self.shapes.image_size, dtype) | family.guidance_input(network, None)
        shapes = self.shapes.description.embedding_shapes | {name: value.shape for name, value in shared.items()}
        conditions = {
            name: torch.empty(rows, *shape, device=device, dtype=network.dtype) for name, shape in shapes.items()
        }
        with torch.autocast("cpu", dtype, enabled=device == "cpu" and network.dtype != dtype):
            return x, family.call(network, x.to(network.dtype), torch.empty(rows, device=device), conditions)

    def _flow(self, device: str, rows: int = 1) -> tuple[Tensor, Tensor]:
        x = torch.empty(rows, *self.shapes.sample_shape, device=device)
        text = torch.empty(rows, *self.shapes.description.embedding_shapes["text"], device=device)
        return x, self.shapes.flow(x, torch.empty(rows, device=device), text)


def _flops(compute: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def _pass_bytes(compute: Callable[[], tuple[Tensor, Tensor]], network: nn.Module) -> Callable[[int], PassBytes]:
    """Bytes of `compute`, a pass of `ROWS` rows that returns its input and output, and of backward passes; by number of rows."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with LiveRowBytes() as memory:
        x, output = compute()
        kept = memory.live
        if x.requires_grad:
            torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True)
        torch.autograd.grad(output, parameters, torch.ones_like(output))
    peaks = memory.peaks()
    return lambda rows: PassBytes(kept(rows), max(peak(rows) for peak in peaks))


def _traffic(
    compute: Callable[[], tuple[Tensor, Tensor]], parameters: list[nn.Parameter]
) -> Callable[[int], PassTraffic]:
    """Traffic of `compute`, a pass of `ROWS` rows that returns its input and output, and of the backward pass to `parameters`, or
    to the input if there are none; by number of rows."""
    with MovedRowBytes() as moved:
        x, output = compute()
        forward = moved.total
        torch.autograd.grad(output, parameters or x, torch.ones_like(output))
    both = moved.total
    return lambda rows: PassTraffic(forward(rows), both(rows) - forward(rows))
