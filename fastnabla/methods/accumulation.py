"""What every training step shares: gradients added up over micro-batches, and smaller ones when memory runs out."""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastnabla.distributed.world import ALONE, World
from fastnabla.methods.whole_batch import whole_counts, whole_rows
from fastnabla.methods.zero_gradients import require_connected
from fastnabla.models.compiling import pad_rows
from fastnabla.models.policy import Policy, add_gradients
from fastnabla.objective.backend import select
from fastnabla.objective.settings import Backend

logger = logging.getLogger("fastnabla.process")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a training step did; the tensors are on the device."""

    losses: dict[str, Tensor]
    """Scalars: "loss" and its weighted parts."""
    rows: dict[str, Tensor]
    """Numbers by row of the batch, `[M]`."""
    statistics: dict[str, Tensor]
    """Scalars to be logged besides the losses."""
    counts: dict[str, int]
    """Rows, by kind."""
    passes: dict[str, float]
    """U per row, by kind of row; nan if there was none."""
    signals: dict[str, Tensor]
    """Scalars that are zero only where nothing can be learned; see `fastnabla.methods.zero_gradients`."""
    path: str
    """How the gradients were computed, in words."""


class Part(Protocol):
    """Rows that go through the networks together."""

    rows: Tensor
    """Their positions in the batch, `[n]` int64 on the host."""

    @property
    def kind(self) -> str:
        """What they are counted as."""

    @property
    def pass_rows(self) -> tuple[int, ...]:
        """Rows of its network passes, in an order that all parts of a step share; the first are all of its rows."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What the rows of a part add to a step."""

    gradients: Sequence[Tensor]
    """By parameter."""
    losses: dict[str, Tensor]
    """The parts of the loss, scalars."""
    rows: dict[str, Tensor]
    """Numbers by row, `[n]`."""


class Accumulation:
    """Adds the gradients of a batch to the parameters' `.grad`, part by part. Nothing in it waits for the device.

    Args:
        policy: whose passes are counted.
        flow: a second network that is trained, or None.
        micro_batch: most rows in a part. Running out of the GPU's memory halves it.
        backend: what computes between the network passes; see `fastnabla.objective.backend`.
    """

    kinds: tuple[str, ...] = ("inner", "last")
    """Of rows."""
    world: World = ALONE
    """Whose ranks each call the step, with their share of a batch: its means are over all of it, and so are its reports.
    The gradients are this rank's share of the sum."""

    def __init__(self, policy: Policy, flow: nn.Module | None, micro_batch: int, backend: Backend) -> None:
        self.policy, self.flow, self.micro_batch = policy, flow, micro_batch
        self.ops = select(backend, policy.conditions.device)
        self.flow_parameters = list(flow.parameters()) if flow is not None else []
        self.parameters = policy.trainable() + self.flow_parameters
        self.replicated = self.flow_parameters if policy.is_sharded else self.parameters
        """Parameters whose gradients are not yet added up over the ranks after a step."""

    def state_dict(self) -> dict[str, Any]:
        """What the step remembers from one call to the next, for `torch.save`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""

    def _accumulate(
        self, count: int, cut: Callable[[Tensor, int], list[Part]], share: Callable[[Part], Share]
    ) -> StepReport:
        """Go through a batch of `count` rows.

        Args:
            count: M.
            cut: rows `[m]` of the batch and a size to parts of at most that size.
            share: computes a part; it is called again for smaller parts if memory runs out.

        Raises:
            torch.OutOfMemoryError: not even one row at a time fits.
        """
        losses: dict[str, list[Tensor]] = {}
        rows: dict[str, list[Tensor]] = {}
        passes, counts = dict.fromkeys(self.kinds, 0), dict.fromkeys(self.kinds, 0)
        pending = deque(cut(torch.arange(count), self.micro_batch))
        self._fix_sizes(pending)
        while pending:
            part, before = pending.popleft(), self.policy.passes.rows
            done = self._attempt(len(part.rows), share, part)
            if done is None:
                rest = torch.cat([part.rows, *(other.rows for other in pending)])
                pending = deque(cut(rest, self.micro_batch))
                self._fix_sizes(pending)
                self.policy.passes.rows = before
                continue
            self._add(done.gradients)
            for lists, new in ((losses, done.losses), (rows, done.rows)):
                for name, values in new.items():
                    lists.setdefault(name, []).append(values)
            del done  # else its gradients are held while the next ones are made
            passes[part.kind] += self.policy.passes.rows - before
            counts[part.kind] += len(part.rows)
        while self.policy.accumulate(None):  # of other processes, that have more parts
            pass

        sums = {name: torch.stack(values).sum() for name, values in losses.items()}
        self.world.sum_(list(sums.values()))
        joined = whole_rows(self.world, {name: torch.cat(values) for name, values in rows.items()})
        counts, passes = whole_counts(self.world, counts, passes)
        return StepReport(
            losses=sums | {"loss": torch.stack(list(sums.values())).sum()},
            rows=joined,
            statistics=self._statistics(joined),
            counts=counts,
            passes={kind: passes[kind] / counts[kind] if counts[kind] else float("nan") for kind in self.kinds},
            signals=self._signals(joined),
            path=self.path,
        )

    @property
    def path(self) -> str:
        """How gradients are computed, in words."""
        return f"compute.compile = {self.policy.compile!r}, torch {torch.__version__}, {self.ops.name}"

    def _fix_sizes(self, parts: Sequence[Part]) -> None:
        """Where networks are compiled, let their passes have few numbers of rows, each of which is compiled for: that of
        the largest part, and where passes are shared, a smaller one for next states."""
        if self.policy.compile == "none" or not parts:
            return
        own, *others = (max(rows) for rows in zip(*(part.pass_rows for part in parts), strict=True))
        largest = max((own, *self.policy.static_rows))
        smaller = [*self.policy.static_rows[:-1], *(rows for rows in others if 0 < 2 * rows <= own)]
        self.policy.static_rows = (*([max(smaller)] if smaller else ()), largest)

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """`StepReport.signals` of numbers by row."""
        raise NotImplementedError

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars to be logged, of numbers by row."""
        return {}

    def _attempt(self, size: int, compute: Callable[..., T], *arguments: Any) -> T | None:
        """What `compute` returns. If memory runs out with its `size` rows: None, and from now on smaller parts; nothing
        else has changed then."""
        try:
            return compute(*arguments)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # No longer within the exception, whose frames hold what is to be freed.
        self.micro_batch, self.policy.static_rows = (size + 1) // 2, ()
        if self.policy.conditions.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory with %d rows in a micro-batch; going on with %d", size, self.micro_batch)
        return None

    def _flow_values(self, states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """What the flow network makes of states `[n, C, H, W]`, alike; in bfloat16 (autocast) where the policy's dtype is
        of half precision."""
        mixed = self.policy.dtype in (torch.bfloat16, torch.float16)
        rows, static = len(states), max(self.policy.static_rows, default=1)
        padded = math.ceil(rows / static) * static if self.policy.compile == "whole" else rows
        if padded > rows:
            states, timestep, prompt = pad_rows((states, timestep, prompt), padded)
        with torch.autocast(states.device.type, torch.bfloat16, enabled=mixed):
            return self.flow(states, timestep, self.policy.conditions.of_prompts(prompt))[:rows]

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        """Of a scalar, by parameter; zeros where it does not depend on one of the flow's, or of a network's that is trained
        whole.

        Raises:
            ZeroGradientError: it does not depend on the policy.
        """
        weights = [*self.policy.weights(), *self.flow_parameters]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        names = list(self.policy.trained())
        require_connected(gradients[: len(names)], names, self.policy.is_lora, self.path)
        pairs = zip(weights, gradients, strict=True)
        return [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in pairs]

    def _add(self, gradients: Sequence[Tensor]) -> None:
        count = len(gradients) - len(self.flow_parameters)
        self.policy.accumulate(gradients[:count])
        add_gradients(self.flow_parameters, gradients[count:])
