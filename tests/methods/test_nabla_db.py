import collections
import copy
import dataclasses
import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fastnabla.methods.nabla_db import BalanceStep, StepReport
from fastnabla.objective.gaussian import guide
from fastnabla.objective.settings import Objective
from tests.checks import BACKENDS, assert_gradients
from tests.golden import STEP_SETS, GoldenStep, load_step

# The reference's coefficients are float32 (σ² of the last step is off by 1.3e-5), and it subtracts two scores of
# size 1/σ where fastnabla cancels by hand.
LOSS = {"rtol": 1e-4, "atol": 1e-6}
GUIDANCE = ("lookahead", "lookahead_detached", "terminal")
WITH_FLOW = [folder for folder in STEP_SETS if (folder / "flow").exists()]
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
@pytest.mark.parametrize("folder", STEP_SETS, ids=lambda folder: folder.name)
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


def guided(pair: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return pair
    unconditional, conditional = pair.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def published_gradients(golden: GoldenStep, objective: Objective) -> dict[str, Tensor]:
    """Gradients of the objective one transition at a time, every score by autograd of a log-density or a reward."""
    policy, table, last_step = golden.policy, golden.table, len(golden.table) - 1
    parameters = policy.trainable() + (list(golden.flow.parameters()) if golden.flow else [])
    for parameter in parameters:
        parameter.grad = None

    def log_density(x: Tensor, x_next: Tensor, o: Tensor, i: int) -> Tensor:
        return -((x_next - table.a[i] * x - table.b[i] * o) ** 2).sum() / (2 * table.sigma[i] ** 2)

    def reward_of(clean: Tensor, prompt: str) -> Tensor:
        return golden.reward(golden.decoder(clean), [prompt]).sum()

    def gamma(alpha_bar: Tensor) -> Tensor:
        return alpha_bar.sqrt() if objective.gamma == "sqrt_alpha_bar" else alpha_bar

    def reward_score(x: Tensor, o: Tensor, coefficients: tuple[Tensor, Tensor], alpha_bar: Tensor, row: int) -> Tensor:
        prompt = str(golden.transitions.prompt[row].item())
        if objective.reward_gradient == "terminal":
            same = golden.transitions.trajectory == golden.transitions.trajectory[row]
            finished = golden.transitions.step_index == last_step
            x = golden.transitions.x_next[same & finished][:1].clone().requires_grad_()
            clean = x
        else:
            o = o.detach() if objective.reward_gradient == "lookahead_detached" else o
            clean = coefficients[0] * x + coefficients[1] * o
        (gradient,) = torch.autograd.grad(reward_of(clean, prompt), x, retain_graph=True)
        return objective.beta * gamma(alpha_bar) * gradient

    for row in range(len(golden.transitions)):
        one = golden.transitions[row : row + 1]
        i, prompt = int(one.step_index), one.prompt
        embedding = policy.conditions.of_prompts(prompt)
        x, x_next = one.x.clone().requires_grad_(), one.x_next.clone().requires_grad_()
        timestep, timestep_next = table.timestep[i : i + 1], table.timestep_next[i : i + 1]
        o = guided(policy(x, timestep, prompt), policy.guidance_scale)
        o_ref = guided(policy.reference(x, timestep, prompt), policy.guidance_scale)
        o_next = guided(policy(x_next, timestep_next, prompt), policy.guidance_scale)
        s, s_ref = (
            torch.autograd.grad(log_density(x, x_next, out, i), x_next, create_graph=True)[0]
            for out in (o, o_ref.detach())
        )
        at_x, at_next = (table.c[i], table.d[i]), (table.c_next[i], table.d_next[i])
        forward = (
            s - objective.prior_weight * s_ref - reward_score(x_next, o_next, at_next, table.alpha_bar_next[i], row)
        )
        loss = 0
        if golden.flow:
            g_next = golden.flow(one.x_next, timestep_next, embedding)
            if i == last_step:
                loss = loss + g_next.square().mean()
            else:
                forward = forward - g_next
                back, back_ref = (
                    torch.autograd.grad(log_density(x, one.x_next, out, i), x, retain_graph=True)[0]
                    for out in (o, o_ref)
                )
                reverse = objective.prior_weight * (back - back_ref) + golden.flow(one.x, timestep, embedding)
                reverse = reverse + reward_score(x, o, at_x, table.alpha_bar[i], row)
                loss = loss + objective.reverse_weight * reverse.square().mean()
        loss = loss + forward.square().mean() + objective.trust_region_weight * (o - one.model_output).square().mean()
        (loss / len(golden.transitions)).backward(inputs=parameters)
    return {name: gradient.clone() for name, gradient in golden.gradients().items()}


@pytest.mark.parametrize("reward_gradient", GUIDANCE)
@pytest.mark.parametrize("folder", STEP_SETS, ids=lambda folder: folder.name)
def test_agrees_with_the_published_algorithm(folder, reward_gradient):
    golden = load_once(folder)
    step = golden.step(4, reward_gradient=reward_gradient)
    _, gradients = run(golden, step)
    assert_gradients(gradients, published_gradients(golden, step.objective))


def test_weighting_by_sigma():
    """Equal to the score weighting once each row's loss is divided by its σ²."""
    golden = load_once(WITH_FLOW[0])
    by_score, _ = run(golden, golden.step(4))
    by_sigma, gradients = run(golden, golden.step(4, weighting="sigma"))
    variance = golden.table.sigma[by_score.rows["step_index"]].float() ** 2
    torch.testing.assert_close(by_sigma.rows["loss_forward"], variance * by_score.rows["loss_forward"], **LOSS)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_gradients_add_up_over_calls():
    golden = load_once(WITH_FLOW[0])
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


@pytest.mark.parametrize("reward_gradient", GUIDANCE)
def test_rewards_see_the_prompts_of_their_rows(reward_gradient):
    golden = load_once(WITH_FLOW[0])
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


def test_terminal_guidance_wants_whole_trajectories():
    golden = load_step(STEP_SETS[0])
    inner = golden.transitions[golden.transitions.step_index != len(golden.table) - 1]
    with pytest.raises(ValueError, match="last transition of every trajectory"):
        golden.step(4, reward_gradient="terminal")(inner)
