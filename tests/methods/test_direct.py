"""ReFL, DRaFT-K with its penalty, and DRaFT-LV against the sampler written out in float64."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn

from fastnabla.methods.direct import (
    DirectStep,
    Ending,
    last_step_redrawn,
    last_steps,
    late_prediction,
    late_step,
    random_k,
)
from fastnabla.trajectories.sources import Trajectories, UnsampledTrajectories
from fastnabla.transition import TransitionTable
from tests.checks import assert_gradients, ddim, flow_table
from tests.exact import Exact
from tests.golden import GoldenStep
from tests.small_step import small_step

STEPS, COUNT, SHAPE, LATE, REDRAWS, KL = 5, 3, (4, 8, 8), 2, 2, 10.0
RANDOM_K = 3
SHARED = next(seed for seed in range(100) if random_k(seed, STEPS) == RANDOM_K)
TRAJECTORIES = Trajectories(prompt=torch.tensor([2, 0, 1]), noise=[11, 12, 13], draws=[21, 22, 23], shared=SHARED)
STOPS = [late_step(seed, LATE, STEPS) for seed in TRAJECTORIES.draws]


@functools.cache
def golden() -> GoldenStep:
    table = TransitionTable.from_scheduler(ddim(), STEPS)
    return dataclasses.replace(small_step().without_flow(), table=table)


def step_of(ending: Ending, micro_batch: int = COUNT, reward: nn.Module | None = None) -> DirectStep:
    g = golden()
    networks = (g.policy, g.decoder, reward or g.reward, [str(i) for i in range(3)], g.table)
    return DirectStep(*networks, SHAPE, ending, micro_batch, kl=KL)


def run(step: DirectStep, trajectories: Trajectories = TRAJECTORIES, total: int | None = None):
    for parameter in step.parameters:
        parameter.grad = None
    report = step(trajectories, total)
    return report, {name: gradient.clone() for name, gradient in golden().gradients().items()}


class Sampler:
    """Float64 trajectories by the formulas, one at a time, with the noise of their seeds."""

    def __init__(self, number: int) -> None:
        self.exact, self.prompt = Exact(golden()), TRAJECTORIES.prompt[number : number + 1]
        self.generator = torch.Generator().manual_seed(TRAJECTORIES.noise[number])
        self.x = self.noise()
        self.deviations = []

    def noise(self) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator)[None].double()

    def move(self, x: Tensor, i: int) -> Tensor:
        o = self.exact.output(x, i, self.prompt)
        self.deviations.append(self.deviation(x, o, i))
        a, b, sigma = (self.exact.at(name, i) for name in ("a", "b", "sigma"))
        return a * x + b * o + sigma * self.noise()

    def deviation(self, x: Tensor, o: Tensor, i: int) -> Tensor:
        """The mean squared difference of the predicted noises; the reference's is a constant."""
        with torch.no_grad():
            o_ref = self.exact.output(x, i, self.prompt, reference=True)
        signal, noise = self.exact.at("alpha_bar", i).sqrt(), self.exact.at("noise_std", i)
        noises = [(x - signal * self.exact.clean(x, output, i)) / noise for output in (o, o_ref)]
        return (noises[0] - noises[1]).square().mean()

    def walk(self, until: int, gradient_from: int = STEPS) -> Tensor:
        for i in range(until):
            self.x = self.move(self.x if i > gradient_from else self.x.detach(), i)
        return self.x


def draft(k: int):
    def rewarded(number: int) -> tuple[Sampler, list[Tensor]]:
        sampler = Sampler(number)
        return sampler, [sampler.walk(STEPS, gradient_from=STEPS - k)]

    return rewarded


def unguided_refl(number: int) -> tuple[Sampler, list[Tensor]]:
    return refl(number, guidance_scale=None)


def refl(number: int, **guidance: None) -> tuple[Sampler, list[Tensor]]:
    sampler, stop = Sampler(number), STOPS[number]
    for name, value in guidance.items():
        setattr(sampler.exact.policy, name, value)
    x = sampler.walk(stop).detach()
    return sampler, [sampler.exact.clean(x, sampler.exact.output(x, stop, sampler.prompt), stop)]


def draft_lv(number: int) -> tuple[Sampler, list[Tensor]]:
    sampler, last = Sampler(number), STEPS - 1
    sample = sampler.walk(STEPS, gradient_from=last)
    finished = sample.detach()
    share = sampler.exact.at("alpha_bar", last) / sampler.exact.at("alpha_bar_next", last)
    added = (sampler.exact.at("noise_std", last) ** 2 - share * sampler.exact.at("noise_std_next", last) ** 2).sqrt()
    states = [share.sqrt() * finished + added * sampler.noise() for _ in range(REDRAWS)]
    return sampler, [sample, *(sampler.move(x, last) for x in states)]


CASES = {
    "draft-1": (last_steps(1), draft(1), STEPS + 1),
    "draft-3": (last_steps(3), draft(3), STEPS + 3),
    "draft-all": (last_steps(STEPS), draft(STEPS), 2 * STEPS),
    "draft-lv": (last_step_redrawn(REDRAWS), draft_lv, STEPS + 1 + 2 * REDRAWS),
    "refl": (late_prediction(LATE), refl, sum(STOPS) / COUNT + 2),
    "refl-unguided": (late_prediction(LATE, guidance_scale=1), unguided_refl, (sum(STOPS) / COUNT + 2) / 2),
    "draft-random-kl": (last_steps(STEPS, random=True, penalised=True), draft(RANDOM_K), STEPS + 2 * RANDOM_K),
}


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [COUNT, 2])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, micro_batch):
    ending, rewarded, passes = CASES[name]
    report, gradients = run(step_of(ending, micro_batch))

    expected, rewards, penalties = {}, [], []
    for number in range(COUNT):
        sampler, latents = rewarded(number)
        values = torch.stack([sampler.exact.reward(clean, sampler.prompt)[0] for clean in latents])
        rewards.append(values.mean().detach().float())
        loss = -values.mean() / COUNT
        if "kl" in name:
            penalty = KL * torch.stack(sampler.deviations[-RANDOM_K:]).mean() / COUNT
            loss = loss + penalty
            penalties.append(penalty.item())
        for parameter, gradient in sampler.exact.gradients(golden(), loss).items():
            expected[parameter] = expected.get(parameter, 0) + gradient
    assert_gradients(gradients, expected)
    torch.testing.assert_close(report.rows["reward"], torch.stack(rewards), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(report.losses["reward"], -torch.stack(rewards).mean(), rtol=1e-5, atol=1e-6)
    assert report.losses.get("kl", torch.tensor(0.0)).item() == pytest.approx(sum(penalties), rel=1e-4)
    torch.testing.assert_close(
        report.losses["loss"], sum(report.losses[part] for part in report.losses if part != "loss")
    )
    torch.testing.assert_close(report.statistics["rollout_reward"], -report.losses["reward"])
    assert report.passes == {"trajectory": pytest.approx(passes)}


@pytest.mark.parametrize("name", ["draft-lv", "draft-random-kl", "refl"])
def test_gradients_in_flows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The redraws' noise and the penalty's ε have the noise levels t of a flow."""
    flow = dataclasses.replace(golden(), table=flow_table(STEPS))
    monkeypatch.setitem(globals(), "golden", lambda: flow)
    test_gradients(name, COUNT)


def test_refl_draws_a_step_of_its_own_for_each_trajectory():
    assert len(set(STOPS)) > 1, "the seeds of this test draw one step for all"
    drawn = [late_step(seed, LATE, STEPS) for seed in range(300)]
    assert sorted(set(drawn)) == list(range(LATE, STEPS))


def test_align_prop_draws_one_k_for_an_update() -> None:
    source = UnsampledTrajectories(7, count=6, prompts=2, updates=3)
    shared = [source.select(rollout, torch.tensor([part])).shared for rollout in (0, 1) for part in range(6)]
    assert shared[::2] == shared[1::2] and len(set(shared)) == 6, "one for each update, on whatever rank"
    assert sorted({random_k(seed, 4) for seed in range(100)}) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("refl-unguided", "draft-random-kl")])
def test_calls_add_up_and_a_trajectory_depends_on_its_seeds_alone(name):
    step = step_of(CASES[name][0])
    _, expected = run(step)
    run(step, TRAJECTORIES[torch.tensor([2])], COUNT)
    step(TRAJECTORIES[torch.tensor([1, 0])], COUNT)
    assert_gradients(golden().gradients(), expected)


def test_checkpointed_blocks_give_the_same():
    _, expected = run(step_of(last_steps(3)))
    checkpointed = small_step().without_flow()
    checkpointed.policy.optimise(checkpoint=True)
    step = step_of(last_steps(3))
    step = DirectStep(
        checkpointed.policy, step.decoder, step.reward, step.prompts, step.table, SHAPE, step.ending, COUNT
    )
    step(TRAJECTORIES)
    assert_gradients(checkpointed.gradients(), expected)


def test_out_of_memory_takes_fewer_trajectories():
    _, expected = run(step_of(last_steps(2)))

    class Limited(nn.Module):
        def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
            if len(images) > 1:
                raise torch.OutOfMemoryError("simulated")
            return golden().reward(images, prompts)

    step = step_of(last_steps(2), reward=Limited())
    report, gradients = run(step)
    assert step.micro_batch == 1
    assert report.passes == {"trajectory": STEPS + 2}
    assert_gradients(gradients, expected)
