"""The fused operations of the objective, as `test_every_operation.py` and their own tests call them."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastnabla.objective.ops import ObjectiveOps
from tests.kernel_cases import PAIRS, Batch

AT_PREDICTION = ("reward_score",)
"""What is missing where the reward's score is that of the clean prediction."""
WHOLE_SCORES = PAIRS
"""What is missing where the scores of a reverse residual need no direct parts."""
NO_REWARD = ("pixel_score",)
"""What is missing where the reward's gradient does not pass the policy."""
NO_FLOW_NEXT = ("flow_next",)
"""What is missing in a batch of last rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """A fused operation."""

    compute: Callable[[ObjectiveOps, Batch], dict[str, Tensor]]
    """Its results by name; the first one is differentiated."""
    inputs: tuple[str, ...]
    """Tensors that it reads."""
    trained: tuple[str, ...] = ()
    """Those of them that get gradients."""
    without: tuple[tuple[str, ...], ...] = ((),)
    """Sets of tensors that may be missing."""
    unread: frozenset[tuple[str, bool]] = frozenset()
    """(name, of a last row) of what has no influence."""

    def evaluate(self, operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
        """The results, and gradients to the trained tensors under random weights of the rows."""
        leaves = {n: batch[n].detach().requires_grad_() for n in self.trained if batch[n] is not None}
        results = self.compute(operations, batch.replace(**leaves))
        values = {name: result.detach() for name, result in results.items()}
        if not leaves:
            return values
        first = next(iter(results.values()))
        gradients = torch.autograd.grad((batch["upstream"] * first).sum(), leaves.values())
        return values | {gradient_of(name): gradient for name, gradient in zip(leaves, gradients, strict=True)}

    def laid_out_as(self, batch: Batch) -> dict[str, Tensor]:
        """Results of the states' shape → the tensor that has their shape, dtype and layout."""
        return {gradient_of(name): batch[name] for name in self.trained} or {"cotangent": batch["output"]}


def gradient_of(name: str) -> str:
    return f"gradient of {name}"


def _forward_balance(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    output, output_ref, x, x_next, *others = (batch[name] for name in FORWARD_BALANCE.inputs)
    result = operations.forward_balance(output, output_ref, x, x_next, batch.rows, *others, **batch.settings)
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}


def _reverse_cotangent(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    output, x, x_next, pixel_score = (batch[name] for name in REVERSE_COTANGENT.inputs)
    return {"cotangent": operations.reverse_cotangent(output, x, x_next, batch.rows, pixel_score, **batch.settings)}


def _reverse_balance(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    loss = operations.reverse_balance(
        batch["score"],
        batch["score_ref"],
        batch.rows,
        batch["flow"],
        batch["reward_score"],
        batch["pixel_score"] if batch["reward_score"] is None else None,
        None if batch["output"] is None else (batch["output"], batch["output_ref"]),
        **batch.settings,
    )
    return {"loss": loss}


def _reference_cotangent(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    output, *scores = (batch[name] for name in REFERENCE_COTANGENT.inputs)
    return {"cotangent": operations.reference_cotangent(output, batch.rows, *scores, **batch.settings)}


def _reference_balance(operations: ObjectiveOps, batch: Batch) -> dict[str, Tensor]:
    loss = operations.reference_balance(
        batch["vjp"],
        batch.rows,
        batch["flow"],
        batch["reward_score_next"],
        batch["flow_next"],
        batch["reward_score"],
        batch["pixel_score"] if batch["reward_score"] is None else None,
        objective=batch.objective,
    )
    return {"loss": loss}


FORWARD_BALANCE = Operation(
    compute=_forward_balance,
    inputs=("output", "output_ref", "x", "x_next", "reward_score_next", "flow_next", "output_old"),
    trained=("output", "flow_next"),
    without=((), ("flow_next",), ("output_old",)),
)
REVERSE_COTANGENT = Operation(
    compute=_reverse_cotangent,
    inputs=("output", "x", "x_next", "pixel_score"),
    without=((), NO_REWARD),
)
REVERSE_BALANCE = Operation(
    compute=_reverse_balance,
    inputs=("score", "score_ref", "flow", "reward_score", "output", "output_ref"),
    trained=("flow",),
    without=((), WHOLE_SCORES, AT_PREDICTION, (*WHOLE_SCORES, *AT_PREDICTION)),
    unread=frozenset((name, True) for name in ("score", "score_ref", "flow", "reward_score", "output", "output_ref")),
)
REFERENCE_COTANGENT = Operation(
    compute=_reference_cotangent,
    inputs=("output", "reward_score_next", "flow_next", "pixel_score"),
    without=((), NO_REWARD, NO_FLOW_NEXT, (*NO_REWARD, *NO_FLOW_NEXT)),
    unread=frozenset({("output", False), ("output", True), ("flow_next", True)}),
)
REFERENCE_BALANCE = Operation(
    compute=_reference_balance,
    inputs=("vjp", "flow", "reward_score_next", "flow_next", "reward_score"),
    trained=("flow",),
    without=((), NO_FLOW_NEXT, AT_PREDICTION, (*NO_FLOW_NEXT, *AT_PREDICTION)),
    unread=frozenset({("flow_next", True)}),
)
OPERATIONS = {
    "forward_balance": FORWARD_BALANCE,
    "reverse_cotangent": REVERSE_COTANGENT,
    "reverse_balance": REVERSE_BALANCE,
    "reference_cotangent": REFERENCE_COTANGENT,
    "reference_balance": REFERENCE_BALANCE,
}
