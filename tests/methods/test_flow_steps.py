"""Training steps of flows: the reference's golden steps in other units, and the definition in float64.

The golden UNet predicts ε at variance-preserving states x. In the units y = k x, k = 1/(√ᾱ + √(1 − ᾱ)), it is the velocity network
``v(y) = (ε(y/k) − y)/(1 − t)`` of a flow with the same signal-to-noise ratios. Scores are in units of 1/y. So with g(y) = g(x)/k, the
gradients are the reference's once each row's residuals are multiplied by k at the state that they belong to.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.transition import TransitionTable
from tests.checks import BACKENDS, assert_gradients, flow_table, matched_flow_table, randn
from tests.exact import Exact
from tests.golden import ALL_STEP_SETS, GoldenStep, load_step
from tests.small_step import small_step


@dataclasses.dataclass
class Levels:
    """The states' timesteps and coefficients before all steps and after the last, `[T + 1]`."""

    plain: Tensor
    flow: Tensor
    k: Tensor
    signal: Tensor
    """1 − t."""

    @classmethod
    def of(cls, plain: TransitionTable, flow: TransitionTable) -> "Levels":
        def both(table: TransitionTable, name: str) -> Tensor:
            return torch.cat([getattr(table, name), getattr(table, f"{name}_next")[-1:]])

        k = 1 / (both(plain, "alpha_bar").sqrt() + both(plain, "noise_std"))
        return cls(both(plain, "timestep"), both(flow, "timestep"), k, k * both(plain, "alpha_bar").sqrt())

    def at(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The plain timesteps, k and 1 − t at a flow's timesteps."""
        i = (timestep[:, None] == self.flow).int().argmax(1)
        assert torch.equal(self.flow[i], timestep)
        return self.plain[i], *(value[i].to(like.dtype).view(-1, 1, 1, 1) for value in (self.k, self.signal))


def as_velocity(predict: Callable, levels: Levels) -> Callable:
    """The forward pass of a UNet that predicts ε, as that of a velocity network."""

    def forward(y: Tensor, timestep: Tensor, *arguments, **settings) -> tuple[Tensor]:
        plain, k, signal = levels.at(timestep, y)
        return ((predict(y / k, plain, *arguments, **settings)[0] - y) / signal,)

    return forward


def as_flow(golden: GoldenStep) -> tuple[GoldenStep, Levels]:
    """The golden step in the units of a flow. γ is the reference's, a function of its own ᾱ."""
    plain = golden.table
    table = matched_flow_table(plain, golden.meta["eta"])
    levels = Levels.of(plain, table)
    table = dataclasses.replace(table, alpha_bar=plain.alpha_bar, alpha_bar_next=plain.alpha_bar_next)
    golden.policy.network.forward = as_velocity(golden.policy.network.forward, levels)
    if golden.flow is not None:
        flow = golden.flow.forward

        def scaled(y: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
            plain, k, _ = levels.at(timestep, y)
            return flow(y / k, plain, embeddings) / k

        golden.flow.forward = scaled
    rows = golden.transitions
    k, k_next, signal = (
        values[i].float().view(-1, 1, 1, 1)
        for values, i in (
            (levels.k, rows.step_index),
            (levels.k, rows.step_index + 1),
            (levels.signal, rows.step_index),
        )
    )
    y = k * rows.x
    transitions = dataclasses.replace(
        rows, x=y, x_next=k_next * rows.x_next, model_output=(rows.model_output - y) / signal
    )
    return dataclasses.replace(golden, table=table, transitions=transitions), levels


def gradients_of_row(golden: GoldenStep, levels: Levels, row: int, backend: str) -> dict[str, Tensor]:
    """k'² times the gradients of one row, where k' belongs to x'. The weights of the residuals that are not at x' make up for it."""
    i = int(golden.transitions.step_index[row])
    k, k_next, signal = levels.k[i].item(), levels.k[i + 1].item(), levels.signal[i].item()
    step: BalanceStep = golden.step(
        4,
        backend,
        reverse_weight=golden.objective.reverse_weight * (k / k_next) ** 2,
        trust_region_weight=golden.objective.trust_region_weight * (signal / k_next) ** 2,
    )
    for parameter in step.parameters:
        parameter.grad = None
    step(golden.transitions[row : row + 1], len(golden.transitions))
    return {name: torch.zeros(()) if g is None else k_next**2 * g for name, g in golden.gradients().items()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", ALL_STEP_SETS)
def test_agrees_with_the_reference_as_a_flow(folder: Path, backend: str) -> None:
    """To the tolerance of the variance-preserving step. A finished sample is decoded as it is, so here in the reference's units."""
    golden, levels = as_flow(load_step(folder))
    decode, last = golden.decoder.forward, len(golden.table) - 1
    total: dict[str, Tensor] = {}
    for row, step in enumerate(golden.transitions.step_index.tolist()):
        scale = levels.k[-1].item() if step == last else 1.0
        golden.decoder.forward = lambda latents, scale=scale: decode(latents / scale)
        for name, gradient in gradients_of_row(golden, levels, row, backend).items():
            total[name] = total.get(name, 0) + gradient
    assert_gradients(total, {name: g for name, g in golden.expected.items() if name.startswith("grad.")})


def sampled_by(table: TransitionTable) -> GoldenStep:
    """A small step whose transitions are those of `table`, with its UNet for a velocity network."""
    golden = small_step()
    batch = golden.transitions
    rows = table.rows(batch.step_index, batch.x)
    x_next = rows.a * batch.x + rows.b * batch.model_output + rows.sigma * randn(*batch.x.shape, seed=3)
    return dataclasses.replace(golden, table=table, transitions=dataclasses.replace(batch, x_next=x_next))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ("ddim", {}),
        ("ddim", {"reverse_target": "reference"}),
        ("flow-sde", {}),
        ("dance", {}),
        ("cps", {"reward_gradient": "lookahead_detached"}),
    ],
    ids=str,
)
def test_agrees_with_the_definition(rows: str, settings: dict) -> None:
    golden = sampled_by(flow_table(50, 0.7, rows=rows))
    step = golden.step(4, weighting="sigma", **settings)
    step(golden.transitions)
    exact = Exact(golden)
    loss = exact.reference_target_loss if settings.get("reverse_target") == "reference" else exact.balance_loss
    assert_gradients(golden.gradients(), exact.gradients(golden, loss(step.objective)))


@pytest.mark.slow
def test_plain_nabla_db_agrees_with_the_definition() -> None:
    """With the noising kernel of a flow whose sampler ends before the clean sample."""
    golden = sampled_by(flow_table(50, end=0.02))
    step = golden.step(4, noising=True, weighting="sigma", prior_weight=1.0)
    step(golden.transitions)
    exact = Exact(golden)
    assert_gradients(golden.gradients(), exact.gradients(golden, exact.balance_loss(step.objective, noising=True)))
    with pytest.raises(ValueError, match=r"method = 'db': the sampler ends at the clean sample"):
        sampled_by(flow_table(50)).step(4, noising=True, prior_weight=1.0)
