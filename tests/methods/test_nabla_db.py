"""Residual ∇-DB's training step against the reference implementation, the published algorithm, and its definition in float64."""

import collections
import copy
import dataclasses
import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from bench.naive import naive_step
from fastnabla.methods.accumulation import StepReport
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.objective.gaussian import guide
from fastnabla.objective.settings import Objective
from tests.checks import BACKENDS, assert_gradients
from tests.exact import Exact
from tests.golden import ALL_STEP_SETS, STEP_SETS, GoldenStep, load_step
from tests.small_step import shared_step, small_step

# The reference's coefficients are float32 (σ² of the last step is off by 1.3e-5), and it subtracts two scores of
# size 1/σ where fastnabla cancels by hand.
LOSS = {"rtol": 1e-4, "atol": 1e-6}
REWARD_GRADIENTS = ("lookahead", "lookahead_detached", "terminal")
load_once = functools.cache(load_step)


def run(golden: GoldenStep, step: BalanceStep) -> tuple[StepReport, dict[str, Tensor]]:
    """The report and the gradients of one call, from zero."""
    for parameter in step.parameters:
        parameter.grad = None
    report = step(golden.transitions)
    return report, {name: gradient.clone() for name, gradient in golden.gradients().items()}


def slots(golden: GoldenStep, name: str) -> Tensor:
    """A golden per-row number, as a flat batch has it: trajectory by trajectory."""
    count = golden.inputs["timesteps"].shape[1]
    return torch.stack([golden.expected[f"{j}.{name}"] for j in range(count)], 1).flatten()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("micro_batch", [1, 4, 100])
@pytest.mark.parametrize("folder", ALL_STEP_SETS)
def test_agrees_with_the_reference(folder, micro_batch, backend):
    golden = load_once(folder)
    report, gradients = run(golden, golden.step(micro_batch, backend))
    assert_gradients(gradients, {name: g for name, g in golden.expected.items() if name.startswith("grad.")})

    last = golden.transitions.step_index == len(golden.table) - 1
    order = torch.cat([torch.where(~last)[0], torch.where(last)[0]])
    assert torch.equal(report.rows["step_index"], golden.transitions.step_index[order])
    torch.testing.assert_close(report.rows["loss_forward"], slots(golden, "loss_forward")[order], **LOSS)
    torch.testing.assert_close(report.rows["trust"], slots(golden, "unet_reg")[order], **LOSS)

    count, objective = len(last), golden.objective
    expected = {
        "forward": slots(golden, "loss_forward").mean(),
        "trust_region": objective.trust_region_weight * slots(golden, "unet_reg").mean(),
        # The reference averages the terminal loss over its slot of last rows alone.
        "terminal": golden.expected["0.loss_terminal"] * last.sum() / count,
        "reverse": torch.tensor(0.0),
    }
    if golden.flow:
        # In last rows the reference's reverse loss is a constant, which trains nothing.
        expected["reverse"] = objective.reverse_weight * slots(golden, "loss_reverse_per_sample")[~last].sum() / count
    expected["loss"] = torch.stack(list(expected.values())).sum()
    for name, value in expected.items():
        torch.testing.assert_close(report.losses[name], value, **LOSS, msg=lambda text, name=name: f"{name}: {text}")
    assert report.passes == ({"inner": 7, "last": 3} if golden.flow else {"inner": 5, "last": 3})


@pytest.mark.slow
@pytest.mark.parametrize("reward_gradient", REWARD_GRADIENTS)
@pytest.mark.parametrize("changes", [{}, {"prior_weight": 1.0, "gamma": "alpha_bar"}], ids=str)
def test_gradients(changes, reward_gradient):
    """Against the definition in float64."""
    golden = shared_step()
    step = golden.step(4, reward_gradient=reward_gradient, **changes)
    _, gradients = run(golden, step)
    exact = Exact(golden)
    assert_gradients(gradients, exact.gradients(golden, exact.balance_loss(step.objective)))


@pytest.mark.slow
def test_gradients_without_a_flow():
    golden = shared_step().without_flow()
    step = golden.step(4, prior_weight=1.0, gamma="alpha_bar", reverse_weight=0.0)
    report, gradients = run(golden, step)
    exact = Exact(golden)
    assert_gradients(gradients, exact.gradients(golden, exact.balance_loss(step.objective)))
    assert report.passes == {"inner": 5, "last": 3}


@pytest.mark.slow
@pytest.mark.parametrize("reverse_weight", [1.0, 0.0])
@pytest.mark.parametrize("folder", STEP_SETS, ids=lambda folder: folder.name)
def test_agrees_with_the_published_algorithm(folder, reverse_weight):
    """Slot by slot, each of one drawn step of every trajectory."""
    golden = load_once(folder)
    step = golden.step(4, reverse_weight=reverse_weight)
    _, gradients = run(golden, step)
    for parameter in step.parameters:
        parameter.grad = None
    rows, count = golden.transitions, golden.inputs["timesteps"].shape[1]
    slots = [rows[slot::count] for slot in range(count)]
    arguments = (golden.reward, step.prompts, golden.table, step.objective, slots)
    naive_step(golden.policy, golden.flow, golden.decoder, *arguments)
    assert_gradients(gradients, golden.gradients())


@pytest.mark.slow
def test_weighting_by_sigma():
    """Equal to the score weighting once each row's loss is divided by its σ²."""
    golden = shared_step()
    by_score, _ = run(golden, golden.step(4))
    by_sigma, gradients = run(golden, golden.step(4, weighting="sigma"))
    variance = golden.table.sigma[by_score.rows["step_index"]].float() ** 2
    torch.testing.assert_close(by_sigma.rows["loss_forward"], variance * by_score.rows["loss_forward"], **LOSS)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_gradients_add_up_over_calls():
    golden = shared_step()
    step = golden.step(4)
    _, expected = run(golden, step)
    for parameter in step.parameters:
        parameter.grad = None
    total = len(golden.transitions)
    step(golden.transitions[:4], total)
    step(golden.transitions[4:], total)
    assert_gradients(golden.gradients(), expected)


class Recorder(nn.Module):
    """A reward that remembers what it was asked."""

    def __init__(self, reward: nn.Module) -> None:
        super().__init__()
        self.reward, self.images, self.prompts = reward, [], []

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == len(prompts)
        self.images.extend(images.detach())
        self.prompts.extend(prompts)
        return self.reward(images, prompts)


@pytest.mark.parametrize("reward_gradient", REWARD_GRADIENTS)
def test_rewards_see_the_prompts_of_their_rows(reward_gradient):
    golden = shared_step()
    recorder = Recorder(golden.reward)
    decoder = copy.copy(golden.decoder)
    decoder.chunk = 2
    golden = dataclasses.replace(golden, reward=recorder, decoder=decoder)
    run(golden, golden.step(4, reward_gradient=reward_gradient))

    rows = golden.transitions
    last = rows.step_index == len(golden.table) - 1
    inner = 0 if reward_gradient == "terminal" else 2  # look-ahead rewards x̂0(x) and x̂0(x') of inner transitions
    counts = collections.Counter({str(p): 0 for p in range(golden.meta["batch_size"])})
    for prompt, is_last in zip(rows.prompt.tolist(), last.tolist(), strict=True):
        counts[str(prompt)] += 1 if is_last else inner
    assert collections.Counter(recorder.prompts) == counts

    expected = [
        (image, str(p))
        for image, p in zip(golden.decoder.decode(rows.x_next[last]), rows.prompt[last].tolist(), strict=True)
    ]
    if reward_gradient != "terminal":
        with torch.no_grad():
            for states, timesteps, c, d in (
                (rows.x, golden.table.timestep, golden.table.c, golden.table.d),
                (rows.x_next, golden.table.timestep_next, golden.table.c_next, golden.table.d_next),
            ):
                i = rows.step_index
                o = guide(golden.policy(states, timesteps[i], rows.prompt), golden.policy.guidance_scale)
                clean = (c[i, None, None, None] * states + d[i, None, None, None] * o).float()[~last]
                images = golden.decoder.decode(clean)
                expected += [(image, str(p)) for image, p in zip(images, rows.prompt[~last].tolist(), strict=True)]
    for image, prompt in expected:
        distances = torch.stack([(other - image).abs().max() for other in recorder.images])
        nearest = int(distances.argmin())
        assert distances[nearest] < 1e-4
        assert recorder.prompts[nearest] == prompt


@pytest.mark.parametrize("name", ["beta", "prior_weight", "reverse_weight", "trust_region_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_objective_rejects(name, value):
    with pytest.raises(ValueError, match=rf"objective\.{name} = {value}: must be finite"):
        Objective(**{name: value})


def test_terminal_reward_gradients_need_whole_trajectories():
    golden = small_step()
    inner = golden.transitions[golden.transitions.step_index != len(golden.table) - 1]
    with pytest.raises(ValueError, match="last transition of every trajectory"):
        golden.step(4, reward_gradient="terminal")(inner)
