"""The policy: a diffusers UNet and what of it is trained, and the reference policy, the same UNet as it was pretrained.

With a LoRA both share all weights: the reference is the network with its adapter off. When all parameters are trained,
the reference is a second, frozen network.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fastnabla.config.sections import LORA_TARGETS, Attention
from fastnabla.models.compiling import Compile, compile_blocks, compiled, pad_rows
from fastnabla.models.conditions import Conditions
from fastnabla.models.lora import Lora, add_lora

if TYPE_CHECKING:
    from fastnabla.distributed.sharding import ShardedNetwork
    from fastnabla.distributed.world import World


class PassCounter:
    """Counts network passes by rows: a forward or a backward of N guided samples adds N."""

    def __init__(self) -> None:
        self.rows = 0

    def watch(self, output: Tensor, rows: int) -> Tensor:
        """Count the forward pass that made `output`, and every backward pass that enters it."""
        self.rows += rows
        return self.watch_backward(output, rows)

    def watch_backward(self, output: Tensor, rows: int) -> Tensor:
        """Count every backward pass that enters `output`."""
        if output.requires_grad:
            output.register_hook(lambda _: self._count(rows))
        return output

    def _count(self, rows: int) -> None:
        self.rows += rows


class Policy(nn.Module):
    """Guided outputs of the finetuned and of the reference policy.

    Args:
        unet: a frozen `UNet2DConditionModel` without adapters, in the dtype that is computed in; it becomes the policy.
        conditions: the prompts.
        guidance_scale: w of classifier-free guidance; None or 1 runs the conditional rows alone.
        rank: rank of the LoRA, which is also its alpha; 0 trains all parameters instead.
        targets: names of the layers that get a LoRA.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditions: Conditions,
        guidance_scale: float | None,
        rank: int = 8,
        targets: tuple[str, ...] = LORA_TARGETS,
    ) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(False).eval()
        self.conditions = conditions
        self.guidance_scale = None if guidance_scale == 1 else guidance_scale
        self.dtype = unet.dtype
        self.pretrained: nn.Module | None = None
        self.shards: ShardedNetwork | None = None
        self.pretrained_shards: ShardedNetwork | None = None
        self.lora: Lora | None = None
        if rank:
            self.lora = add_lora(unet, rank, targets)
        else:
            self.pretrained = copy.deepcopy(unet)
            unet.float().requires_grad_()
        self.passes = PassCounter()
        self._memory_format = torch.contiguous_format
        self._call = _call
        self._reference = False
        self.twice_differentiable = True
        self.compile: Compile = "none"
        self.static_rows: tuple[int, ...] = ()
        """Numbers of rows that a pass can have, ascending, so that few graphs are compiled: fewer rows are padded, and
        more are split. (): any number."""

    def shard(self, world: World) -> None:
        """Keep of all weights only this process's share, but for what a phase of the run computes with.

        The finetuned network is whole outside `updating`, the reference within `whole_reference`. Where `dtype` is of half
        precision the whole weights are too, and no longer cast by autocast.

        Args:
            world: the processes, which all have the same weights, and train all of them.
        """
        from fastnabla.distributed.sharding import ShardedNetwork

        device = self.conditions.device
        self.shards = ShardedNetwork(self.unet, world, device, self.dtype)
        self.pretrained_shards = ShardedNetwork(self.pretrained, world, device, self.dtype)
        self.shards.gather()

    def optimise(
        self,
        compile: Compile = "none",
        attention: Attention = "sdpa",
        channels_last: bool = False,
        checkpoint: bool = False,
    ) -> None:
        """Choose how the networks compute; what they compute stays the same, beyond rounding.

        A compiled network with a LoRA is one graph for each number of rows, whatever is asked of it: a pass without
        gradient builds a graph and throws it away, gradients of the LoRA are computed where only those of the input are wanted
        (0.6 % more arithmetic in a backward pass of Stable Diffusion 1.5), and the reference has B = 0. Otherwise two graphs of one network would
        round differently in half precision, and what should cancel in ``o_θ − o_ref`` and ``o_θ − o_old`` would not.

        Args:
            compile: "whole" networks, their repeated "blocks" alone, or "none"; see `fastnabla.models.compiling`.
            attention: "sdpa", torch's; or "xformers".
            channels_last: keep weights and activations in NHWC order.
            checkpoint: recompute the UNet's blocks in the backward pass instead of keeping their activations.

        Raises:
            ValueError: xformers is asked for and cannot run, or a whole graph of a network that is sharded.
        """
        if compile == "whole" and self.shards is not None:
            raise ValueError(
                "compute.compile = 'whole': not of a network that is sharded over processes; use blocks, or none, or "
                "--memory.shard False."
            )
        networks = [self.unet] if self.pretrained is None else [self.unet, self.pretrained]
        for network in networks:
            if attention == "xformers":
                _use_xformers(network)
            if channels_last and self.shards is None:  # FSDP2 gathers into contiguous weights
                network.to(memory_format=torch.channels_last)
            if checkpoint:
                network.enable_gradient_checkpointing()
            if compile == "blocks":
                compile_blocks(network, (ResnetBlock2D, BasicTransformerBlock))
        self.compile = compile
        if self.lora is not None:
            self.lora.one_graph = compile != "none"
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._call = compiled(_call) if compile == "whole" else _call
        self.twice_differentiable = compile == "none" and attention == "sdpa" and not checkpoint

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA is trained, rather than all parameters."""
        return self.pretrained is None

    @property
    def is_sharded(self) -> bool:
        """Whether each process has its share of the weights alone."""
        return self.shards is not None

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the UNet, float32; `DTensor`s if they are sharded."""
        if self.shards is not None:
            return self.shards.shards
        return {n: p for n, p in self.unet.named_parameters() if not self.is_lora or "lora_" in n}

    def trainable(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self.trained().values())

    def weights(self) -> list[Tensor]:
        """What gradients are taken to, in the order of `trainable`: the same; what is gathered of them, if they are
        sharded; or a LoRA rounded to `dtype`, if that is of half precision."""
        if self.shards is not None:
            return self.shards.weights()
        return self.trainable() if self.lora is None else self.lora.weights(self.dtype)

    def accumulate(self, gradients: Sequence[Tensor] | None) -> bool:
        """Add gradients of `weights` to the `.grad` of `trainable`.

        If they are sharded, it adds the sum over the processes, which all call it equally often: with None when they have
        no more, until it says that none had any.
        """
        if self.shards is not None:
            return self.shards.accumulate(gradients)
        if gradients is not None:
            add_gradients(self.trainable() if self.lora is None else self.lora.masters, gradients)
        return gradients is not None

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """Output pair `[2N, …]` (unconditional rows first; `[N, …]` without guidance) in `dtype`.

        Args:
            x: states `[N, C, H, W]`.
            timestep: `[N]` int64.
            prompt: `[N]` int64, prompt numbers from 0.
        """
        largest = max(self.static_rows, default=len(x))
        if len(x) > largest:
            parts = zip(x.split(largest), timestep.split(largest), prompt.split(largest), strict=True)
            outputs = [self._output(*part) for part in parts]
            return torch.cat([torch.cat(pair) for pair in zip(*map(self._halves, outputs), strict=True)])
        return self._output(x, timestep, prompt)

    def _output(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """`forward` of as many rows as a pass has."""
        rows, guided = len(x), self.guidance_scale is not None
        padded = next((size for size in self.static_rows if size >= rows), rows)
        if self.lora is not None:
            self.lora.refresh(self.dtype)
        with_graph = torch.is_grad_enabled()
        with torch.enable_grad() if self._one_graph else contextlib.nullcontext():
            if self._one_graph and not x.requires_grad:
                x = x.detach().requires_grad_()
            if padded > rows:
                x, timestep, prompt = pad_rows((x, timestep, prompt), padded)
            x = x.to(self.dtype, memory_format=self._memory_format)
            if guided:
                x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            network = self.pretrained if self._reference and not self.is_lora else self.unet
            mixed = network.dtype != self.dtype
            with torch.autocast(x.device.type, self.dtype, enabled=mixed) if mixed else contextlib.nullcontext():
                output = self._call(network, x, timestep, self.conditions(prompt, guided))
            if padded > rows:
                output = torch.cat([half[:rows] for half in self._halves(output)])
        return self.passes.watch(output if with_graph else output.detach(), padded)

    def _halves(self, output: Tensor) -> tuple[Tensor, ...]:
        return output.chunk(1 if self.guidance_scale is None else 2)

    @property
    def _one_graph(self) -> bool:
        return self.lora is not None and self.lora.one_graph

    def reference(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """The same of the pretrained policy."""
        with self.pretrained_weights():
            return self(x, timestep, prompt)

    @contextlib.contextmanager
    def pretrained_weights(self) -> Iterator[None]:
        """Within, `forward` is the reference policy."""
        self._reference = True
        if self.lora is not None:
            self.lora.weights(self.dtype)
            self.lora.enable(False)
        try:
            yield
        finally:
            self._reference = False
            if self.lora is not None:
                self.lora.enable(True)

    @contextlib.contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Within, outputs carry no gradient to the parameters, and keep nothing for one. A compiled network with a LoRA still
        has them, and they are not to be asked for."""
        weights = [] if self.is_lora else self.weights()
        if self.lora is not None:
            self.lora.switches.constant = not self._one_graph
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            if self.lora is not None:
                self.lora.switches.constant = False
            for weight in weights:
                weight.requires_grad_()

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Within, the trained parameters may be changed, and nothing computed if they are sharded."""
        if self.shards is None:
            yield
            return
        self.shards.release()
        yield
        self.shards.gather()

    @contextlib.contextmanager
    def whole_reference(self) -> Iterator[None]:
        """Within, the reference policy can be computed if it is sharded, too."""
        if self.pretrained_shards is None:
            yield
            return
        self.pretrained_shards.gather()
        yield
        self.pretrained_shards.release()


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Add `gradients`, of any dtype, to the parameters' `.grad`."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if parameters and parameters[0].dtype != gradients[0].dtype:
        # Adding tensors of two dtypes would be a launch each.
        wide = [torch.empty_like(parameter) for parameter in parameters]
        torch._foreach_copy_(wide, list(gradients))
        gradients = wide
    if parameters:
        torch._foreach_add_([parameter.grad for parameter in parameters], list(gradients))


def _call(network: nn.Module, x: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
    return network(x, timestep, **conditions, return_dict=False)[0]


def _use_xformers(network: nn.Module) -> None:
    remedy = "use --compute.attention sdpa, or: pip install xformers"
    try:
        network.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError) as error:
        raise ValueError(f"compute.attention = 'xformers': the package is not installed; {remedy}") from error
    except Exception as error:  # xformers raises of many kinds when its operators do not run here
        raise ValueError(f"compute.attention = 'xformers': it does not run here ({error}); {remedy}") from error
