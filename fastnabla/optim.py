"""The optimizer: AdamW over the LoRA and the flow network, one update a step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastnabla.config import FlowConfig, OptimizerConfig
from fastnabla.policy import Policy


def step_size_factor(update: int, updates: int, schedule: str, warmup: int) -> float:
    """Share of the full step size in update number `update`, from 0, of `updates`; never 0."""
    rise = min(1.0, (update + 1) / (warmup + 1))
    done = update / updates
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return rise * fall[schedule]


class Optimizer:
    """AdamW with a parameter group and a gradient-norm bound for each of LoRA and flow network.

    Args:
        policy: whose LoRA is trained.
        flow: g_φ, or None.
        config, flow_config: settings.
        updates: length of the run, for the learning rates' schedule.
    """

    def __init__(
        self, policy: Policy, flow: nn.Module | None, config: OptimizerConfig, flow_config: FlowConfig, updates: int
    ) -> None:
        self.max_grad_norm = config.max_grad_norm
        self.groups = {"lora": policy.trainable()}
        settings = [{"lr": config.learning_rate, "weight_decay": config.weight_decay}]
        if flow is not None:
            self.groups["flow"] = list(flow.parameters())
            settings.append({"lr": flow_config.learning_rate, "weight_decay": flow_config.weight_decay})
        self.adamw = torch.optim.AdamW(
            [{"params": group} | setting for group, setting in zip(self.groups.values(), settings, strict=True)],
            betas=(config.beta1, config.beta2),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda update: step_size_factor(update, updates, config.schedule, config.warmup)
        )

    def update(self) -> dict[str, Tensor]:
        """Apply and clear the accumulated gradients; their norms before clipping, by group."""
        norms = {f"grad_norm_{name}": self._clip(group) for name, group in self.groups.items()}
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return norms

    def _clip(self, parameters: Iterable[Tensor]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
