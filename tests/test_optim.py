"""The optimizer: step sizes, groups, clipping."""

import pytest
import torch
from torch import nn

from fastnabla.config import FlowConfig, OptimizerConfig
from fastnabla.optim import Optimizer, step_size_factor


class Stub(nn.Module):
    """What the optimizer sees of a policy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def trainable(self) -> list[nn.Parameter]:
        return [self.weight]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_step_sizes_rise_then_stay_or_fall_and_are_never_zero(schedule: str, warmup: int) -> None:
    factors = [step_size_factor(update, 20, schedule, warmup) for update in range(20)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[0] == 1 / (warmup + 1)
    assert factors[-1] == 1 if schedule == "constant" else factors[-1] < 0.1


def test_each_group_has_its_own_norm_bound_and_step_size() -> None:
    policy, flow = Stub(), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(flow.weight)
    optimizer = Optimizer(
        policy,
        flow,
        OptimizerConfig(learning_rate=0.1, max_grad_norm=1.0, weight_decay=0.0, warmup=1),
        FlowConfig(learning_rate=0.01, weight_decay=0.0),
        10,
    )
    policy.weight.grad = torch.tensor([30.0, 40.0, 0.0, 0.0])
    flow.weight.grad = torch.tensor([[0.5]])
    norms = optimizer.update()
    assert norms["grad_norm_lora"].item() == pytest.approx(50)
    assert norms["grad_norm_flow"].item() == pytest.approx(0.5)
    # AdamW's first update is the step size times the sign; the warm-up halves it.
    torch.testing.assert_close(policy.weight.data, torch.tensor([-0.05, -0.05, 0.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.weight.data, torch.tensor([[-0.005]]), atol=1e-6, rtol=0)
    assert policy.weight.grad is None and flow.weight.grad is None
