"""VGG-Flow and Reward Score Matching: losses and gradients against their formulas in float64, and what the methods refuse."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnabla.config.methods import MethodName
from fastnabla.config.model_sections import FlowConfig, ModelConfig, RewardConfig, SamplerConfig
from fastnabla.config.train import TrainConfig
from fastnabla.config.training_sections import EvaluationConfig, MemoryConfig, RolloutConfig
from fastnabla.methods.accumulation import Accumulation, StepReport
from fastnabla.methods.registry import STEPS
from fastnabla.methods.velocity_matching import VelocityMatchingStep
from fastnabla.models.build import Networks
from fastnabla.objective.settings import Gamma, Objective
from fastnabla.training.trainer import Trainer
from fastnabla.transition import TransitionTable
from tests.checks import BACKENDS, assert_gradients, flow_table
from tests.exact import Exact, grad
from tests.golden import GoldenStep
from tests.runs import on_testbed, small, smallest, train
from tests.small_step import small_step

BETA = 300.0


@functools.cache
def diffusion() -> GoldenStep:
    """Tiny networks with a LoRA that is not zero, and three transitions of each of three trajectories, the last ones included."""
    return small_step().without_flow()


@functools.cache
def flow(rows: str = "euler") -> GoldenStep:
    """The same for a flow model: the golden UNet predicts velocities."""
    found = small_step().without_flow()
    table, batch = flow_table(len(found.table), rows=rows), found.transitions
    at = table.rows(batch.step_index, batch.x)
    x_next = at.a * batch.x + at.b * batch.model_output
    return dataclasses.replace(found, table=table, transitions=dataclasses.replace(batch, x_next=x_next))


def config_of(method: MethodName, micro_batch: int = 4, backend: str = "torch", **objective: object) -> TrainConfig:
    return TrainConfig(
        method=method,
        objective=Objective(**({"beta": BETA} | objective)),
        flow=FlowConfig(kind="none"),
        memory=MemoryConfig(micro_batch=micro_batch, decode_chunk=4),
        backend=backend,
    )


def step_of(subject: GoldenStep, config: TrainConfig) -> Accumulation:
    """The training step of a run of `config` with these networks."""
    networks = Networks(
        policy=subject.policy,
        flow=None,
        decoder=subject.decoder,
        gradient_decoder=subject.decoder,
        table=subject.table,
        sample_shape=tuple(subject.transitions.x.shape[1:]),
    )
    return STEPS[config.method].build(config, networks, subject.reward, [str(i) for i in range(3)])


def run(subject: GoldenStep, config: TrainConfig) -> tuple[StepReport, dict[str, Tensor]]:
    step = step_of(subject, config)
    for parameter in step.parameters:
        parameter.grad = None
    report = step(subject.transitions)
    return report, {name: gradient.clone() for name, gradient in subject.gradients().items()}


Values = dict[str, list[float]]


class Formula:
    """The papers' losses in float64, row by row. In flows t is the noise level, and v the velocity from data to noise."""

    def __init__(self, subject: GoldenStep) -> None:
        self.subject, self.exact = subject, Exact(subject)

    def end(self, row: int) -> Tensor:
        """x_T of the row's trajectory."""
        batch = self.subject.transitions
        last = (batch.trajectory == batch.trajectory[row]) & (batch.step_index == len(self.subject.table) - 1)
        return batch.x_next[last].double().requires_grad_()

    def vgg_flow(self, power: float, detached: bool) -> tuple[Tensor, Values]:
        """``‖ v_θ(x_t) − [v_ref(x_t) − β (1 − t)^power ∇_{x_t} r(x_t − t v_θ(x_t))] ‖²``; with `detached`, v_θ is a constant in r."""

        def score(row: int, x: Tensor, v: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            clean = x - t * (v.detach() if detached else v)
            return (1 - t) ** power * grad(self.exact.reward(clean, prompt).sum(), x, retain_graph=True)

        return self.matching(score)

    def rsm_flow(self, kappa: float) -> tuple[Tensor, Values]:
        """``‖ v_θ(x_t) − [v_ref(x_t) − β (1 − t) ∇r(x_T)] ‖² + κ ‖ v_θ − v_old ‖²``."""

        def score(row: int, x: Tensor, v: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            end = self.end(row)
            return (1 - t) * grad(self.exact.reward(end, prompt).sum(), end)

        return self.matching(score, kappa)

    def matching(self, score: Callable[..., Tensor], kappa: float = 0.0) -> tuple[Tensor, Values]:
        losses, values = [], {"norm_ref": [], "norm_residual": [], "norm_reward": [], "norm_target": []}
        for row, (i, x, _, v_old, prompt) in enumerate(self.exact.rows()):
            v, v_ref = (self.exact.output(x, i, prompt, reference=reference) for reference in (False, True))
            reward = BETA * score(row, x, v, self.exact.at("noise_std", i), prompt)
            target = (v_ref - reward).detach()
            losses.append((v - target).square().mean() + kappa * (v - v_old).square().mean())
            for name, value in zip(values, (v_ref, v - v_ref, reward, target), strict=True):
                values[name].append(value.norm().item())
        return torch.stack(losses).mean(), values

    def rsm_diffusion(self, kappa: float) -> tuple[Tensor, Values]:
        """``‖ σ (s_θ − s_ref) − σ β ∇r(x_T) ‖² + κ ‖ ε_θ − ε_old ‖²`` with the scores s of the densities of x'."""
        losses = []
        for row, (i, x, x_next, o_old, prompt) in enumerate(self.exact.rows()):
            o, o_ref = (self.exact.output(x, i, prompt, reference=reference) for reference in (False, True))
            s = grad(self.exact.log_prob(x, x_next, o, i), x_next, create_graph=True)
            s_ref = grad(self.exact.log_prob(x, x_next, o_ref, i), x_next)
            end = self.end(row)
            sigma, reward = self.exact.at("sigma", i), grad(self.exact.reward(end, prompt).sum(), end)
            residual = sigma * s - sigma * s_ref - sigma * BETA * reward
            losses.append(residual.square().mean() + kappa * (o - o_old).square().mean())
        return torch.stack(losses).mean(), {}


def assert_agrees(
    subject: GoldenStep, config: TrainConfig, loss: Tensor, values: Values, formula: Formula
) -> StepReport:
    """To 1e-4, which allows for float32 rounding through networks and decoder."""
    report, gradients = run(subject, config)
    assert_gradients(gradients, formula.exact.gradients(subject, loss))
    assert report.losses["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    for name, expected in values.items():
        found = dict(zip(_order(report, subject), report.rows[name].tolist(), strict=True))
        assert [found[row] for row in range(len(expected))] == pytest.approx(expected, rel=1e-4), name
    return report


def _order(report: StepReport, subject: GoldenStep) -> list[int]:
    """Rows of the transitions in the order of the report, which has the inner ones first."""
    last = subject.transitions.step_index == len(subject.table) - 1
    order = torch.cat([torch.where(~last)[0], torch.where(last)[0]])
    assert torch.equal(report.rows["step_index"], subject.transitions.step_index[order])
    return order.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("detached", [True, False], ids=["the authors' code", "the formula"])
def test_vgg_flow(detached: bool, backend: str) -> None:
    formula = Formula(flow())
    config = config_of("vgg-flow", backend=backend, reward_gradient="lookahead_detached" if detached else "lookahead")
    report = assert_agrees(flow(), config, *formula.vgg_flow(2, detached), formula)
    passes = 3 if detached else 4
    assert report.passes == {"inner": passes, "last": passes} == STEPS["vgg-flow"].cost(config).passes


@pytest.mark.slow
@pytest.mark.parametrize(("gamma", "power"), [("sqrt_alpha_bar", 1), ("constant", 0)])
def test_other_weights_of_vgg_flow_without_guidance_and_with_noise(gamma: Gamma, power: int) -> None:
    """The states are those of DDPM's rows; a micro-batch of one row adds up to the same."""
    subject = flow("ddim")
    policy, scale = subject.policy, subject.policy.guidance_scale
    policy.guidance_scale = None
    try:
        formula = Formula(subject)
        assert_agrees(subject, config_of("vgg-flow", 1, gamma=gamma), *formula.vgg_flow(power, False), formula)
    finally:
        policy.guidance_scale = scale


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_reward_score_matching(kind: str, backend: str) -> None:
    """With a trust region whose old outputs are not the policy's."""
    subject = flow() if kind == "flow" else diffusion()
    formula, kappa = Formula(subject), 100.0
    loss = formula.rsm_flow(kappa) if kind == "flow" else formula.rsm_diffusion(kappa)
    config = config_of("rsm", backend=backend, trust_region_weight=kappa)
    report = assert_agrees(subject, config, *loss, formula)
    assert report.passes == {"inner": 3, "last": 3} == STEPS["rsm"].cost(config).passes
    without, _ = run(subject, config_of("rsm", trust_region_weight=0.0))
    assert without.losses["loss"] < 0.99 * report.losses["loss"]


def test_on_diffusion_models_it_is_residual_nabla_db_without_a_flow() -> None:
    """With the settings of "reward-score-matching" in `docs/results/comparison.toml`, over the testbed's: bit for bit."""
    recipe = {"reward_gradient": "terminal", "weighting": "sigma", "gamma": "constant"}
    expected, gradients = run(diffusion(), config_of("residual-db", **recipe))
    report, same = run(diffusion(), config_of("rsm"))
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert torch.equal(report.losses["loss"], expected.losses["loss"])


def test_settings_that_the_methods_do_not_have_change_nothing() -> None:
    others = {"prior_weight": 0.5, "weighting": "score", "reverse_weight": 3.0, "reverse_second_order": True}
    for method, more in (("rsm", {"gamma": "sqrt_alpha_bar"}), ("vgg-flow", {"trust_region_weight": 5.0})):
        expected = run(flow(), config_of(method))[1]
        found = run(flow(), config_of(method, **others, **more))[1]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_diffusion_models_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"method = 'vgg-flow': matches velocities, and stable-diffusion-v1-5/.* use rsm"
    ):
        step_of(diffusion(), config_of("vgg-flow"))
    one = diffusion()
    with pytest.raises(ValueError, match="variance-preserving"):
        VelocityMatchingStep(one.policy, one.decoder, one.reward, [], one.table, Objective(), 4)
    one = flow()
    with pytest.raises(ValueError, match=r"objective\.prior_weight = 0\.5: .* set it to 1"):
        VelocityMatchingStep(one.policy, one.decoder, one.reward, [], one.table, Objective(prior_weight=0.5), 4)


def test_planned_costs_over_inner_epochs() -> None:
    """Later ones read the reference's output from a cache."""
    for method, gradient, first, decodes in (
        ("vgg-flow", "lookahead", 4, {"inner": 1, "last": 1}),
        ("vgg-flow", "lookahead_detached", 3, {"inner": 1, "last": 1}),
        ("rsm", "lookahead", 3, {"inner": 0, "last": 1}),
    ):
        config = config_of(method, reward_gradient=gradient)
        rollout = RolloutConfig(epochs=2)
        cost = STEPS[method].cost(dataclasses.replace(config, rollout=rollout, updates=200))
        assert cost.passes == {"inner": first - 0.5, "last": first - 0.5}
        assert (cost.decodes, cost.flow_passes) == (decodes, 0)


def flow_run(method: MethodName, **changes: object) -> TrainConfig:
    settings = {
        "model": ModelConfig(name=smallest("sd3"), dtype="float32"),
        "reward": RewardConfig(terms=("hue=1",)),
        "sampler": SamplerConfig(steps=4, guidance_scale=3.0, scheduler="euler"),
        "evaluation": EvaluationConfig(every=4, samples=2, prompts=2),
    }
    return small(method=method, **(settings | changes))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vgg-flow", "rsm"])
def test_training_on_the_ode(method: MethodName, tmp_path: Path) -> None:
    """Four updates, two a rollout, in two inner epochs, of the smallest SD3: at the planned cost."""
    rollout = RolloutConfig(trajectories=4, fraction=0.5, updates=1, epochs=2)
    config = flow_run(method, rollout=rollout)
    folder = train(config, tmp_path / "run")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["phase"] == "train"]
    first = 4 if method == "vgg-flow" else 3
    assert [record["passes_inner"] for record in records] == [first, first - 1] * 2
    assert [record["passes_last"] for record in records] == [first, first - 1] * 2
    assert all(record["grad_norm_lora"] > 0 and "grad_norm_flow" not in record for record in records)


def test_the_ode_of_a_run_is_eulers_method() -> None:
    """A rollout follows ``x − (t − s) v``; its states are diffusers' own to float32 rounding."""
    trainer = Trainer.from_config(flow_run("rsm"))
    table: TransitionTable = trainer.table
    assert table.is_deterministic and table.is_flow_matching
    torch.testing.assert_close(table.b, table.noise_std_next - table.noise_std)
    assert (table.a == 1).all()
    with pytest.raises(ValueError, match=r"method = 'vgg-flow': .*testbed is not a model of flow matching"):
        Trainer.from_config(on_testbed(small(method="vgg-flow")))
    with pytest.raises(ValueError, match=r"sampler\.scheduler = 'euler': the model is a diffusion model"):
        Trainer.from_config(small(method="rsm", sampler=SamplerConfig(steps=4, scheduler="euler")))
