"""The objective's operations between the network passes; `PLAIN` is their specification in plain torch."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastnabla.objective.balance import ForwardBalance, forward_balance, reverse_balance, reverse_cotangent
from fastnabla.objective.gaussian import gaussian_log_prob, guided_step
from fastnabla.objective.reference_target import reference_balance, reference_cotangent


class ObjectiveOps(NamedTuple):
    """The objective's operations; documented in `gaussian.py`, `balance.py` and `reference_target.py`."""

    name: str
    """What computes them, for logs."""
    guided_step: Callable[..., tuple[Tensor, Tensor]]
    gaussian_log_prob: Callable[..., Tensor]
    forward_balance: Callable[..., ForwardBalance]
    reverse_cotangent: Callable[..., Tensor]
    reverse_balance: Callable[..., Tensor]
    reference_cotangent: Callable[..., Tensor]
    reference_balance: Callable[..., Tensor]


PLAIN = ObjectiveOps(
    "plain torch",
    guided_step,
    gaussian_log_prob,
    forward_balance,
    reverse_cotangent,
    reverse_balance,
    reference_cotangent,
    reference_balance,
)
