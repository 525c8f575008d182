"""The state of a run between two updates, which its checkpoints save."""

import dataclasses
from typing import Any

import torch
from torch import nn

from fastnabla.methods.accumulation import Accumulation
from fastnabla.models.policy import Policy
from fastnabla.optim.ema import WeightAverage
from fastnabla.optim.optimizer import Optimizer
from fastnabla.rewards import RewardSum
from fastnabla.trajectories.buffer import TrajectoryBuffer
from fastnabla.trajectories.pooled_buffer import PooledBuffer
from fastnabla.utils.same_tensors import require_same_tensors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The objects of a run that updates change."""

    policy: Policy
    flow: nn.Module | None
    optimizer: Optimizer
    reward: RewardSum
    step: Accumulation
    buffer: TrajectoryBuffer | PooledBuffer | None
    """None for a method that stores no trajectories."""
    ema: WeightAverage | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of the state except the buffer, which may be empty."""
        return {
            "policy": {name: parameter.detach() for name, parameter in self.policy.trained().items()},
            "flow": self.flow.state_dict() if self.flow is not None else {},
            "optimizer": self.optimizer.algorithm.state_dict(),
            "schedule": self.optimizer.schedule.state_dict(),
            "reward": self.reward.state_dict(),
            "micro_batch": self.step.micro_batch,
            "step": self.step.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned in a run of the same configuration.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is of another configuration.
        """
        trained = self.policy.trained()
        require_same_tensors(state["policy"], trained)
        with self.policy.updating():
            for name, parameter in trained.items():
                parameter.copy_(state["policy"][name])
        if self.flow is not None:
            self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"], state["schedule"])
        self.reward.load_state_dict(state["reward"])
        self.step.micro_batch = state["micro_batch"]
        self.step.load_state_dict(state["step"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has got."""

    update: int = 0
    """Updates done."""
    rollouts: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Metrics of the rollouts in the buffer, oldest first."""
