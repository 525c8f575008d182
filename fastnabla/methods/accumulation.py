"""What all training steps share: a batch goes through the networks in parts, and the gradients of the parts add up.

A step subclasses `Accumulation`. Its method `gradients` computes one part, and its call is a loop over `Parts`:

    parts = Parts(self, len(batch), cut)
    for part in parts:
        parts.add(self._attempt(len(part.rows), self.gradients, part))
    return parts.report()
"""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastnabla.distributed.world import ALONE, World
from fastnabla.methods.zero_gradients import require_connected
from fastnabla.models.compiling import pad_rows
from fastnabla.models.policy import Policy, add_gradients
from fastnabla.objective.backend import select
from fastnabla.objective.settings import Backend

logger = logging.getLogger("fastnabla.process")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a training step did. Tensors are on the device."""

    losses: dict[str, Tensor]
    """Scalars: "loss" and its weighted terms."""
    rows: dict[str, Tensor]
    """Values by row of the batch, `[M]`."""
    statistics: dict[str, Tensor]
    """Scalars to log besides the losses."""
    counts: dict[str, int]
    """Rows, by kind."""
    passes: dict[str, float]
    """U per row, by kind of row; NaN if there was no such row."""
    signals: dict[str, Tensor]
    """Scalars that are zero only if there is nothing to learn; see `fastnabla.methods.zero_gradients`."""
    path: str
    """How the gradients were computed, in words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows that go through the networks together."""

    rows: Tensor
    """Their positions in the batch, `[n]` int64 on the host."""
    kind: str
    """One of the step's `kinds`."""

    @property
    def pass_rows(self) -> tuple[int, ...]:
        """Rows of its network passes, in the same order for all parts of a step; all n come first."""
        return (len(self.rows),)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PartResult:
    """What a part adds to a step."""

    gradients: Sequence[Tensor]
    """By parameter; or of the flow's parameters alone."""
    losses: dict[str, Tensor]
    """The terms of the loss, scalars."""
    rows: dict[str, Tensor]
    """Values by row, `[n]`."""


class Accumulation:
    """Adds the gradients of a batch to the parameters' `.grad`, part by part, without waiting for the device.

    Args:
        policy: the policy, which counts its passes.
        flow: a second network that is trained, or None.
        micro_batch: maximum number of rows in a part. Running out of GPU memory halves it.
        backend: what computes between the network passes; see `fastnabla.objective.backend`.
    """

    kinds: tuple[str, ...] = ("inner", "last")
    """Kinds of rows."""
    world: World = ALONE
    """The ranks. Each calls the step with its rows of a batch. Means and reports are over the whole batch; the gradients
    are this rank's part of the sum."""
    update: int = 0
    """Number of the update that the next call is for, from 0. The caller sets it."""

    def __init__(self, policy: Policy, flow: nn.Module | None, micro_batch: int, backend: Backend) -> None:
        self.policy, self.flow, self.micro_batch = policy, flow, micro_batch
        self.ops = select(backend, policy.conditions.device)
        self.flow_parameters = list(flow.parameters()) if flow is not None else []
        self.parameters = policy.trainable() + self.flow_parameters
        self.replicated = self.flow_parameters if policy.is_sharded else self.parameters
        """Parameters whose gradients the caller still has to sum over the ranks."""

    def state_dict(self) -> dict[str, Any]:
        """What the step remembers between calls, for `torch.save`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def after_update(self) -> None:
        """Called after each update of the weights."""

    @property
    def path(self) -> str:
        """How gradients are computed, in words."""
        return f"compute.compile = {self.policy.compile!r}, torch {torch.__version__}, {self.ops.name}"

    def _signals(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """`StepReport.signals`, from values by row."""
        raise NotImplementedError

    def _statistics(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """`StepReport.statistics`, from values by row."""
        return {}

    def _attempt(self, size: int, compute: Callable[..., T], *arguments: Any) -> T | None:
        """``compute(*arguments)``. If memory runs out with its `size` rows, halve `micro_batch` and return None.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        try:
            return compute(*arguments)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Only after the handler: the exception's frames hold the memory that is to be freed.
        self.micro_batch, self.policy.static_rows = (size + 1) // 2, ()
        if self.policy.conditions.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory with %d rows in a micro-batch; going on with %d", size, self.micro_batch)
        return None

    def _flow_values(
        self, states: Tensor, timestep: Tensor, prompt: Tensor, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Outputs of the flow network at `states`, `[n, C, H, W]`, with other `weights` if they are given, by name. Computed
        in bfloat16 (autocast) if the policy's dtype has 16 bits."""
        mixed = self.policy.dtype in (torch.bfloat16, torch.float16)
        rows, static = len(states), max(self.policy.static_rows, default=1)
        padded = math.ceil(rows / static) * static if self.policy.compile == "whole" else rows
        if padded > rows:
            states, timestep, prompt = pad_rows((states, timestep, prompt), padded)
        with torch.autocast(states.device.type, torch.bfloat16, enabled=mixed):
            arguments = (states, timestep, self.policy.conditions.of_prompts(prompt))
            values = self.flow(*arguments) if weights is None else functional_call(self.flow, weights, arguments)
            return values[:rows]

    def _differentiate(self, loss: Tensor) -> list[Tensor]:
        """Gradients of a scalar, by parameter. They are zero where it does not depend on a parameter of the flow, or of a
        policy that is trained in full.

        Raises:
            ZeroGradientError: the loss does not depend on the policy, or on one of its LoRA layers.
        """
        weights = [*self.policy.weights(), *self.flow_parameters]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        names = list(self.policy.trained())
        require_connected(gradients[: len(names)], names, self.policy.is_lora, self.path)
        pairs = zip(weights, gradients, strict=True)
        return [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in pairs]


class Parts:
    """The parts of one batch, in turn, and the sums over those that are done.

    Args:
        step: the step that computes them.
        count: rows in the batch, M.
        cut: splits rows `[m]` of the batch into parts of at most a given size.
    """

    def __init__(self, step: Accumulation, count: int, cut: Callable[[Tensor, int], Sequence[Part]]) -> None:
        self.step, self.cut, self.count = step, cut, count
        self.losses: dict[str, list[Tensor]] = {}
        self.rows: dict[str, list[Tensor]] = {}
        self.passes: dict[str, float] = dict.fromkeys(step.kinds, 0)
        self.again()

    def again(self) -> None:
        """Start over with all rows. Gradients, losses, values by row and passes of the parts done so far are kept."""
        self.counts = dict.fromkeys(self.step.kinds, 0)
        self._plan(torch.arange(self.count))

    def __iter__(self) -> Iterator[Part]:
        while self._pending:
            self._part, self._passes_before = self._pending.popleft(), self.step.policy.passes.rows
            yield self._part

    def add(self, result: PartResult | None) -> None:
        """Add the result of the current part. None means that memory ran out: its rows come again, in smaller parts."""
        policy, part = self.step.policy, self._part
        if result is None:
            policy.passes.rows = self._passes_before
            self._plan(torch.cat([part.rows, *(other.rows for other in self._pending)]))
            return
        of_policy = len(result.gradients) - len(self.step.flow_parameters)
        if of_policy:
            policy.accumulate(result.gradients[:of_policy])
        add_gradients(self.step.flow_parameters, result.gradients[of_policy:])
        for lists, new in ((self.losses, result.losses), (self.rows, result.rows)):
            for name, values in new.items():
                lists.setdefault(name, []).append(values)
        self.passes[part.kind] += policy.passes.rows - self._passes_before
        self.counts[part.kind] += len(part.rows)

    def report(self) -> StepReport:
        """The report of the whole batch, over all ranks."""
        step, world = self.step, self.step.world
        while step.policy.accumulate(None):  # other ranks have more parts
            pass
        sums = {name: torch.stack(values).sum() for name, values in self.losses.items()}
        world.sum_(list(sums.values()))
        rows = _all_rows(world, {name: torch.cat(values) for name, values in self.rows.items()})
        passes = _summed(world, self.passes, torch.float64)
        counts = _summed(world, self.counts, torch.int64)
        return StepReport(
            losses=sums | {"loss": torch.stack(list(sums.values())).sum()},
            rows=rows,
            statistics=step._statistics(rows),
            counts=counts,
            passes={kind: passes[kind] / counts[kind] if counts[kind] else float("nan") for kind in step.kinds},
            signals=step._signals(rows),
            path=step.path,
        )

    def _plan(self, rows: Tensor) -> None:
        """Cut the remaining rows. A compiled network has a graph for each number of rows, so it gets few: that of the largest
        part, and a smaller one for next states if passes are shared."""
        self._pending = deque(self.cut(rows, self.step.micro_batch))
        policy = self.step.policy
        if policy.compile == "none" or not self._pending:
            return
        own, *others = (max(sizes) for sizes in zip(*(part.pass_rows for part in self._pending), strict=True))
        largest = max((own, *policy.static_rows))
        smaller = [*policy.static_rows[:-1], *(size for size in others if 0 < 2 * size <= own)]
        policy.static_rows = (*([max(smaller)] if smaller else ()), largest)


def _all_rows(world: World, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values by row `[n]` of all ranks, `[N]` in rank order. Each column stays on its device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, values in rows.items():
        kinds.setdefault((values.dtype, values.device), []).append(name)
    whole: dict[str, Tensor] = {}
    for names in kinds.values():
        columns = world.all_gather(torch.stack([rows[name] for name in names], 1))
        whole |= zip(names, columns.unbind(1), strict=True)
    return {name: whole[name] for name in rows}


def _summed(world: World, counts: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Sums of counts over the ranks; all ranks have the same names."""
    numbers = torch.tensor(list(counts.values()), dtype=dtype)
    world.sum_([numbers])
    return dict(zip(counts, numbers.tolist(), strict=True))
