"""The step whose flow follows the reference: its gradients against their definition in float64, and what they depend on."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastnabla.config.model_sections import FlowConfig
from fastnabla.config.train import TrainConfig
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.passes import planned_decodes
from fastnabla.methods.reference_target import ReferenceTargetStep
from fastnabla.objective.settings import Objective
from tests.checks import BACKENDS, assert_gradients
from tests.exact import Exact
from tests.golden import GoldenStep
from tests.methods.test_sharing import batch as adjacent
from tests.methods.test_sharing import gradients
from tests.small_step import shared_step, small_step

TORCH, TRITON = ("torch", ()), ("triton", BACKENDS[1].marks)
REWARD_GRADIENTS = ("lookahead", "lookahead_detached", "terminal")


def step_of(golden: GoldenStep, micro_batch: int = 100, backend: str = "torch", **changes) -> ReferenceTargetStep:
    return golden.step(micro_batch, backend, reverse_target="reference", **changes)


def parts(found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the LoRA and of the flow."""
    lora, flow = ({n: g for n, g in found.items() if n.startswith(f"grad.{part}.")} for part in ("lora", "flow"))
    assert len(lora) + len(flow) == len(found) and lora and flow
    return lora, flow


def differs(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.allclose(one[name], gradient, rtol=0.1) for name, gradient in other.items())


OBJECTIVES = ({"reverse_weight": 3.0}, {"prior_weight": 1.0, "gamma": "alpha_bar", "weighting": "sigma"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward_gradient", "changes", "backend"),
    [
        pytest.param(reward_gradient, changes, name, marks=marks)
        for place, reward_gradient in enumerate(REWARD_GRADIENTS)
        for number, changes in enumerate(OBJECTIVES)
        for name, marks in [(TORCH, TRITON)[(place + number) % 2]]  # every two of them meet
    ],
    ids=str,
)
def test_gradients(reward_gradient, changes, backend):
    """Against the definition in float64, with guidance; micro-batches of inner and of last transitions."""
    golden = shared_step()
    step = step_of(golden, 4, backend, reward_gradient=reward_gradient, **changes)
    assert golden.policy.guidance_scale == 5.0 and isinstance(step, ReferenceTargetStep)
    actual, exact = gradients(golden, step, golden.transitions), Exact(golden)
    assert_gradients(actual, exact.gradients(golden, exact.reference_target_loss(step.objective)))


def test_losses():
    """The report's sum is the loss; the terminal term is 0, because the target counts g(x_T) as 0."""
    golden = shared_step()
    step = step_of(golden, 4, reverse_weight=3.0)
    losses = step(golden.transitions).losses
    exact = Exact(golden).reference_target_loss(step.objective).item()
    assert losses["loss"].item() == pytest.approx(exact, rel=1e-4)
    assert losses["terminal"] == 0 < losses["reverse"]
    assert losses["loss"].item() == pytest.approx(sum(losses[n].item() for n in losses if n != "loss"))


@pytest.mark.slow
@pytest.mark.parametrize("reward_gradient", REWARD_GRADIENTS)
def test_the_forward_residual_trains_the_policy_and_the_reverse_one_the_flow(reward_gradient):
    golden = small_step()
    settings = {"reward_gradient": reward_gradient}
    lora, flow = parts(gradients(golden, step_of(golden, **settings), golden.transitions))

    lora_, flow_ = parts(gradients(golden, step_of(golden, reverse_weight=2.0, **settings), golden.transitions))
    assert_gradients(lora_, lora)
    assert_gradients(flow_, {name: 2 * gradient for name, gradient in flow.items()})

    changed = {"prior_weight": 1.0, "trust_region_weight": 0.0} | settings
    lora_, flow_ = parts(gradients(golden, step_of(golden, **changed), golden.transitions))
    assert differs(lora_, lora)
    assert_gradients(flow_, flow)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in golden.policy.trainable():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    lora_, flow_ = parts(gradients(golden, step_of(golden, **settings), golden.transitions))
    assert differs(lora_, lora)
    assert_gradients(flow_, flow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward_gradient", "micro_batch", "reuse_passes", "backend"),
    [
        pytest.param(reward_gradient, micro_batch, (place + number) % 2 == 1, name, marks=marks)
        for place, reward_gradient in enumerate(REWARD_GRADIENTS)
        for number, (micro_batch, (name, marks)) in enumerate(((4, TORCH), (1, TORCH), (4, TRITON)))
    ]
    + [
        ("lookahead", 4, True, "torch"),
        ("terminal", 4, True, "torch"),
    ],  # one transition has no neighbour to share with
)
def test_micro_batches_and_shared_passes_give_the_same_gradients(reward_gradient, micro_batch, reuse_passes, backend):
    golden = shared_step()
    transitions = adjacent(golden)
    expected = gradients(golden, step_of(golden, reward_gradient=reward_gradient), transitions)
    changes = {"reward_gradient": reward_gradient, "reuse_passes": reuse_passes}
    actual = gradients(golden, step_of(golden, micro_batch, backend, **changes), transitions)
    assert_gradients(actual, expected)


@pytest.mark.parametrize("reuse_passes", [False, True], ids=["apart", "reused"])
@pytest.mark.parametrize("reward_gradient", REWARD_GRADIENTS)
def test_decodes(reward_gradient, reuse_passes):
    """As planned; `test_passes` counts the passes."""
    golden, decoded = shared_step(), []

    class Counter(nn.Module):
        def forward(self, images, prompts):
            decoded.extend(prompts)
            return golden.reward(images, prompts)

    counted = dataclasses.replace(golden, reward=Counter())
    step = step_of(counted, reward_gradient=reward_gradient, reuse_passes=reuse_passes)
    step(adjacent(golden))
    inner, last = planned_decodes(step.objective, True, 2 if reuse_passes else 1)
    assert len(decoded) == 6 * inner + 3 * last


@pytest.mark.slow
def test_an_average_of_the_flow_is_the_target():
    """g(x') is that of the average, and g(x) that of φ itself; the average is part of the step's state."""
    golden = small_step()
    step, parameters = step_of(golden, average=0.5), list(golden.flow.parameters())
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(2):
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        seen.append(copy.deepcopy(golden.flow))
        step.after_update()
    averaged = copy.deepcopy(golden.flow)
    with torch.no_grad():
        for mean, first, second in zip(*(network.parameters() for network in (averaged, *seen)), strict=True):
            mean.copy_((0.5 * first + second) / 1.5)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.other = golden.flow.unet, (averaged,)

        def forward(self, x, timestep, embeddings):
            network = golden.flow if torch.is_grad_enabled() else self.other[0]
            return network(x, timestep, embeddings)

    both = step_of(dataclasses.replace(golden, flow=Both()))
    expected = gradients(golden, both, golden.transitions)
    assert_gradients(gradients(golden, step, golden.transitions), expected)
    assert all(isinstance(value, Tensor) for value in step.state_dict().values())  # for --dump-anomalies
    restored = step_of(golden, average=0.5)
    restored.load_state_dict(step.state_dict())
    assert_gradients(gradients(golden, restored, golden.transitions), expected)
    assert differs(gradients(golden, step_of(golden), golden.transitions), expected)


def test_the_flow_is_not_used_at_finished_samples():
    """g(x) and g(x') of inner transitions, g(x) of last ones."""
    golden, calls = shared_step(), []

    class Counter(nn.Module):
        unet = golden.flow.unet

        def forward(self, x, timestep, embeddings):
            calls.extend((t, torch.is_grad_enabled()) for t in timestep.tolist())
            return golden.flow(x, timestep, embeddings)

    transitions = adjacent(golden)
    step_of(dataclasses.replace(golden, flow=Counter()))(transitions)
    steps, last = transitions.step_index, len(golden.table) - 1
    expected = [(t, True) for t in golden.table.timestep[steps].tolist()]
    expected += [(t, False) for t in golden.table.timestep_next[steps[steps != last]].tolist()]
    assert sorted(calls) == sorted(expected)


def test_settings_that_contradict():
    objective = Objective(reverse_target="reference")
    assert TrainConfig(objective=objective).follows_reference
    assert not TrainConfig(objective=objective, flow=FlowConfig(kind="none")).follows_reference
    with pytest.raises(ValueError, match=r"objective\.reverse_weight = 0\.0: nothing else trains the flow"):
        TrainConfig(objective=dataclasses.replace(objective, reverse_weight=0.0))
    golden = shared_step()
    with pytest.raises(ValueError, match=r"reverse_target = 'reference': BalanceStep computes 'policy'"):
        BalanceStep(
            *(golden.policy, golden.flow, golden.decoder, golden.reward, ["0"], golden.table, objective), micro_batch=1
        )
