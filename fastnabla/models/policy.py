"""The policy, a diffusion network being finetuned, and the reference policy, the same network as pretrained.

With a LoRA both share all weights: the reference is the network with its adapter disabled. When all parameters are trained,
the reference is a second, frozen network.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastnabla.config.model_sections import LORA_TARGETS
from fastnabla.config.training_sections import Attention
from fastnabla.distributed.beacon import BEACON
from fastnabla.distributed.sharding import ShardedNetwork
from fastnabla.distributed.world import World
from fastnabla.models.compiling import Compile, compile_blocks, compiled, pad_rows
from fastnabla.models.conditions import Conditions
from fastnabla.models.families import SD, Family
from fastnabla.models.lora import Lora, add_lora
from fastnabla.models.pass_counter import PassCounter


class Policy(nn.Module):
    """Guided outputs of the finetuned and of the reference policy.

    Args:
        network: a frozen network of `family` without adapters, in the compute dtype, perhaps with quantised layers; it is
            finetuned in place.
        conditions: the prompts.
        guidance_scale: w of classifier-free guidance; None or 1 runs only the conditional rows. A network into which guidance
            was distilled takes w as an input, and runs only these rows too.
        rank: rank and alpha of the LoRA; 0 trains all parameters instead.
        targets: names of the layers that get a LoRA.
        family: how the network is called.
    """

    def __init__(
        self,
        network: nn.Module,
        conditions: Conditions,
        guidance_scale: float | None,
        rank: int = 8,
        targets: tuple[str, ...] = LORA_TARGETS,
        family: Family = SD,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.conditions = conditions
        self.family = family
        self.dtype = network.dtype
        guidance = family.guidance_input(network, guidance_scale)
        conditions.share({name: value.to(self.dtype) for name, value in guidance.items()})
        self.guidance_is_input = bool(guidance)
        self.guidance_scale = None if guidance_scale == 1 or guidance else guidance_scale
        self.pretrained: nn.Module | None = None
        self.shards: ShardedNetwork | None = None
        self.pretrained_shards: ShardedNetwork | None = None
        self.lora: Lora | None = None
        if rank:
            self.lora = add_lora(network, rank, targets)
        else:
            self.pretrained = copy.deepcopy(network)
            # A file's memory may be unaligned. A CPU rounds differently there from the copy.
            for parameter in network.parameters():
                parameter.data = parameter.data.to(torch.float32, copy=True)
            network.float().requires_grad_()
        self.passes = PassCounter()
        self._units: float = 1
        """U of a pass, by row."""
        self._memory_format = torch.contiguous_format
        self._call = family.call
        self._reference = False
        self.twice_differentiable = True
        self.compile: Compile = "none"
        self.static_rows: tuple[int, ...] = ()
        """Allowed numbers of rows in a pass, ascending; () allows any. Smaller batches are padded to the next size, larger
        ones are split, so that few graphs are compiled."""

    def shard(self, world: World) -> None:
        """Shard both networks over the ranks with FSDP2.

        The finetuned network is gathered except within `updating`, the reference only within `whole_reference`. If `dtype`
        is a half-precision type, so are the gathered weights, and autocast no longer casts them.

        Args:
            world: the ranks. All ranks hold the same weights, and all parameters are trained.
        """
        device = self.conditions.device
        self.shards = ShardedNetwork(self.network, world, device, self.dtype)
        self.pretrained_shards = ShardedNetwork(self.pretrained, world, device, self.dtype)
        self.shards.gather()

    def optimise(
        self,
        compile: Compile = "none",
        attention: Attention = "sdpa",
        channels_last: bool = False,
        checkpoint: bool = False,
    ) -> None:
        """Choose how the networks compute. Their outputs change only by rounding.

        A compiled network with a LoRA uses one graph for each number of rows in every kind of pass. A pass without gradients
        builds its autograd graph and discards it. A backward pass to the input also computes the LoRA's gradients (0.6 % more
        arithmetic for Stable Diffusion 1.5). The reference is the same graph with B = 0. Two different graphs of one network
        would round differently in half precision, and ``o_θ − o_ref`` and ``o_θ − o_old`` would not cancel where they should.

        Args:
            compile: the "whole" networks, only their repeated "blocks", or "none"; see `fastnabla.models.compiling`.
            attention: "sdpa" (torch's) or "xformers".
            channels_last: keep weights and activations in NHWC order.
            checkpoint: recompute the network's blocks in the backward pass instead of keeping their activations.

        Raises:
            ValueError: xformers is requested and does not run, or "whole" is requested for a sharded network.
        """
        if compile == "whole" and self.shards is not None:
            raise ValueError(
                "compute.compile = 'whole': not supported for a sharded network; use blocks or none, or "
                "--memory.shard False."
            )
        networks = [self.network] if self.pretrained is None else [self.network, self.pretrained]
        for network in networks:
            if attention == "xformers":
                _use_xformers(network)
            if channels_last and self.shards is None:  # FSDP2 gathers into contiguous weights
                network.to(memory_format=torch.channels_last)
            if checkpoint:
                network.enable_gradient_checkpointing()
            if compile == "blocks":
                compile_blocks(network, self.family.blocks)
        self.compile = compile
        if self.lora is not None:
            self.lora.one_graph = compile != "none"
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._call = compiled(self.family.call) if compile == "whole" else self.family.call
        self.twice_differentiable = compile == "none" and attention == "sdpa" and not checkpoint

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA is trained rather than all parameters."""
        return self.pretrained is None

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over the ranks."""
        return self.shards is not None

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the network, float32; `DTensor`s if sharded."""
        if self.shards is not None:
            return self.shards.shards
        return {n: p for n, p in self.network.named_parameters() if not self.is_lora or "lora_" in n}

    def trainable(self) -> list[nn.Parameter]:
        """The values of `trained`."""
        return list(self.trained().values())

    def weights(self) -> list[Tensor]:
        """The tensors to differentiate with respect to, in the order of `trainable`.

        They are the trained parameters themselves; the gathered ones, if the policy is sharded; or copies of the LoRA in
        `dtype`, if that is a half-precision type.
        """
        if self.shards is not None:
            return self.shards.weights()
        return self.trainable() if self.lora is None else self.lora.weights(self.dtype)

    def accumulate(self, gradients: Sequence[Tensor] | None) -> bool:
        """Add the gradients of `weights` to the `.grad` of `trainable`. Returns whether there were any.

        If sharded, this is collective and adds the sum over the ranks. A rank that has no gradients left passes None, and all
        ranks keep calling until the result is False.
        """
        if self.shards is not None:
            return self.shards.accumulate(gradients)
        if gradients is not None:
            add_gradients(self.trainable() if self.lora is None else self.lora.masters, gradients)
        return gradients is not None

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """Outputs `[2N, …]` in `dtype`, unconditional rows first; `[N, …]` without guidance.

        Args:
            x: states `[N, C, H, W]`.
            timestep: `[N]` float32.
            prompt: prompt indices `[N]`, int64.
        """
        largest = max(self.static_rows, default=len(x))
        if len(x) > largest:
            parts = zip(x.split(largest), timestep.split(largest), prompt.split(largest), strict=True)
            outputs = [self._output(*part) for part in parts]
            return torch.cat([torch.cat(pair) for pair in zip(*map(self._halves, outputs), strict=True)])
        return self._output(x, timestep, prompt)

    def _output(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """`forward` in a single pass."""
        BEACON.advance()
        rows, guided = len(x), self.guidance_scale is not None
        padded = next((size for size in self.static_rows if size >= rows), rows)
        if self.lora is not None:
            self.lora.refresh(self.dtype)
        with_graph = torch.is_grad_enabled()
        # With `_one_graph`, passes without gradients build a graph too; see `optimise`.
        with torch.enable_grad() if self._one_graph else contextlib.nullcontext():
            if self._one_graph and not x.requires_grad:
                x = x.detach().requires_grad_()
            if padded > rows:
                x, timestep, prompt = pad_rows((x, timestep, prompt), padded)
            x = x.to(self.dtype, memory_format=self._memory_format)
            if guided:
                x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            network = self.pretrained if self._reference and not self.is_lora else self.network
            mixed = network.dtype != self.dtype
            with torch.autocast(x.device.type, self.dtype, enabled=mixed) if mixed else contextlib.nullcontext():
                output = self._call(network, x, timestep, self.conditions(prompt, guided))
            if padded > rows:
                output = torch.cat([half[:rows] for half in self._halves(output)])
        return self.passes.watch(output if with_graph else output.detach(), self._units * padded)

    def _halves(self, output: Tensor) -> tuple[Tensor, ...]:
        return output.chunk(1 if self.guidance_scale is None else 2)

    @property
    def _one_graph(self) -> bool:
        return self.lora is not None and self.lora.one_graph

    def reference(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """`forward` of the reference policy."""
        with self.pretrained_weights():
            return self(x, timestep, prompt)

    @contextlib.contextmanager
    def pretrained_weights(self) -> Iterator[None]:
        """Within the context, `forward` is the reference policy."""
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

    def scaled_lora(self, scale: float) -> contextlib.AbstractContextManager[None]:
        """A context within which the LoRA's updates are multiplied by `scale`; see `Lora.scaled`.

        Raises:
            ValueError: all parameters are trained, so that there is no LoRA, or the scale is not finite.
        """
        if self.lora is None:
            raise ValueError("a LoRA scale needs a LoRA; all parameters of this network are trained (lora.rank = 0).")
        return self.lora.scaled(scale)

    @contextlib.contextmanager
    def guided(self, guidance_scale: float | None) -> Iterator[None]:
        """Within the context, outputs have the guidance scale w = `guidance_scale`; 1 is without guidance, None changes nothing.

        U is still a pass over the rows of the policy's own guidance, so a pass without guidance counts half. Not for a network
        into which guidance was distilled.
        """
        own = self.guidance_scale
        if guidance_scale is not None:
            self.guidance_scale = None if guidance_scale == 1 else guidance_scale
            self._units = (1 if self.guidance_scale is None else 2) / (1 if own is None else 2)
        try:
            yield
        finally:
            self.guidance_scale, self._units = own, 1

    @contextlib.contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Within the context, outputs have no gradient with respect to the parameters, and no activations are kept for one.

        A compiled network with a LoRA still tracks those gradients; do not request them.
        """
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
        """Within the context, the trained parameters may be changed. If they are sharded, nothing may be computed."""
        if self.shards is None:
            yield
            return
        self.shards.release()
        yield
        self.shards.gather()

    @contextlib.contextmanager
    def whole_reference(self) -> Iterator[None]:
        """Within the context, a sharded reference policy is gathered, so that it can be computed."""
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
    add_to([parameter.grad for parameter in parameters], gradients)


def add_to(sums: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    """Add `terms`, of any dtype, to `sums` in place."""
    if sums and sums[0].dtype != terms[0].dtype:
        # _foreach_add_ of mixed dtypes falls back to one launch per tensor.
        wide = [torch.empty_like(total) for total in sums]
        torch._foreach_copy_(wide, list(terms))
        terms = wide
    if sums:
        torch._foreach_add_(list(sums), list(terms))


def _use_xformers(network: nn.Module) -> None:
    remedy = "use --compute.attention sdpa, or: pip install xformers"
    try:
        network.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError) as error:
        raise ValueError(f"compute.attention = 'xformers': the package is not installed; {remedy}") from error
    except Exception as error:  # xformers raises many kinds of exceptions if its operators do not run here
        raise ValueError(f"compute.attention = 'xformers': it does not run here ({error}); {remedy}") from error
