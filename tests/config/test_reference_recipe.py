"""`--reference-compat`: what it sets, that each of it acts, and a run against the authors' loop written out."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnabla import rewards
from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import FlowConfig, LoraConfig, RewardConfig, SamplerConfig
from fastnabla.config.presets import PRESETS
from fastnabla.config.reference_recipe import CHOICES, DEPARTURES
from fastnabla.config.train import TrainConfig, from_json, to_json
from fastnabla.config.training_sections import EvaluationConfig, OptimizerConfig, RolloutConfig
from fastnabla.models.flow import build_flow
from fastnabla.objective.settings import Objective
from fastnabla.optim.optimizer import Optimizer
from fastnabla.prompts import assign_prompts, used_prompts
from fastnabla.prompts.split import RunPrompts
from fastnabla.run.resuming import flat
from fastnabla.training.trainer import Trainer
from fastnabla.trajectories.transitions import Transitions
from tests.checks import assert_gradients
from tests.faults import tiny
from tests.golden import STEP_SETS, load_step
from tests.runs import without_pictures

PUBLISHED = ("sd15-aesthetic", "sd15-hpsv2", "sd15-imagereward", "sd15-24gb", "stable-diffusion")


def compatible(**changes) -> TrainConfig:
    """Three rollouts of four trajectories, two updates each."""
    settings = {
        "objective": Objective(beta=20.0, trust_region_weight=1.0),
        "rollout": RolloutConfig(trajectories=4, fraction=0.5, updates=2),
        "flow": FlowConfig(kind="none"),
        "optimizer": OptimizerConfig(),
        "evaluation": EvaluationConfig(every=0, samples=2, prompts=1),
        "reference_compat": True,
    }
    return dataclasses.replace(tiny(), **settings | changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sets_the_departures_alone(name: str) -> None:
    """In a configuration of its own: the presets' sections stay. Read back or changed, it is the same."""
    preset = PRESETS[name][1]
    before = flat(preset)
    config = dataclasses.replace(preset, reference_compat=True)
    changed = {field: value for field, value in flat(config).items() if value != before[field]}
    assert changed == DEPARTURES | {"reference_compat": True}
    assert flat(preset) == before
    assert from_json(to_json(config)) == config == dataclasses.replace(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Objective(weighting="sigma")}, r"objective\.weighting = 'sigma' \(it has score\)"),
        ({"objective": Objective(gamma="constant")}, r"objective\.gamma = 'constant' \(it has alpha_bar or sqrt_alpha_bar\)"),
        (
            {"objective": Objective(reverse_target="reference")},
            r"objective\.reverse_target = 'reference' \(it has policy\)",
        ),
        ({"objective": Objective(reverse_fraction=0.5)}, r"objective\.reverse_fraction = 0\.5 \(it has 1\.0\)"),
        ({"rollout": RolloutConfig(fraction=0.5, replay=3)}, r"rollout\.replay = 3 \(it has 1\)"),
        ({"rollout": RolloutConfig(fraction=0.5, draw="runs")}, r"rollout\.draw = 'runs' \(it has stratified or uniform\)"),
        ({"optimizer": OptimizerConfig(applications=3)}, r"optimizer\.applications = 3 \(it has 2\)"),
        ({"sampler": SamplerConfig(spacing="trailing")}, r"sampler\.spacing = 'trailing' \(it has leading or None\)"),
        ({"sampler": SamplerConfig(min_sigma=0.1)}, r"sampler\.min_sigma = 0\.1 \(it has None\)"),
        ({"lora": LoraConfig(rank=0)}, r"lora\.rank = 0 \(it has a LoRA\)"),
        ({"optimizer": OptimizerConfig(warmup=1, schedule="linear")}, r"schedule = 'linear'.*warmup = 1"),
    ],
)  # fmt: skip
def test_refuses_what_it_does_not_have(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"reference_compat = True: .*{message}.*leave reference_compat out"):
        compatible(**changes)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in CHOICES["method"]])
def test_refuses_other_methods(method: str) -> None:
    with pytest.raises(ValueError, match=rf"method = '{method}' \(it has residual-db or db\)"):
        compatible(method=method)


@pytest.mark.slow
@pytest.mark.parametrize("folder", STEP_SETS, ids=lambda folder: folder.name)
def test_the_objective_is_that_of_the_golden_steps(folder: Path) -> None:
    """With their constants; so gradients are theirs (`tests/methods/test_nabla_db.py` looks at all sets and the losses too)."""
    golden = load_step(folder)
    meta = golden.meta
    constants = {"beta": meta["reward_scale"], "prior_weight": meta["pretrained_strength"]}
    constants |= {"reverse_weight": meta["reverse_loss_scale"], "trust_region_weight": meta["unet_reg_scale"]}
    gamma = {"squared": "alpha_bar"}.get(meta["reward_adaptive_mode"], "sqrt_alpha_bar")
    config = compatible(objective=Objective(**constants, gamma=gamma))
    assert config.objective == golden.objective
    if folder == STEP_SETS[-1]:
        golden.step(100, **dataclasses.asdict(config.objective))(golden.transitions)
        expected = {name: gradient for name, gradient in golden.expected.items() if name.startswith("grad.")}
        assert_gradients(golden.gradients(), expected)


@pytest.mark.slow
def test_gradients_are_applied_as_by_scaler_and_optimizer() -> None:
    """The golden gradients of LoRA and g_φ, through the authors' sequence of torch's calls. Float32 rounding of fused and
    plain AdamW: 1e-6 of steps of 1e-3."""
    golden, plain = (load_step(STEP_SETS[-1]) for _ in range(2))
    config = dataclasses.replace(PRESETS["sd15-aesthetic"][1], reference_compat=True)
    ours = Optimizer(golden.policy, golden.flow, config.optimizer, config.flow, 10)
    once = dataclasses.replace(config.optimizer, applications=1)
    lora, flow = plain.policy.trainable(), list(plain.flow.parameters())
    groups = [{"params": lora, "lr": 1e-3}, {"params": flow, "lr": 1e-3, "weight_decay": 1e-2}]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    scaler = torch.amp.GradScaler("cpu")
    names = list(golden.gradients())
    start = [parameter.detach().clone() for parameter in [*lora, *flow]]
    for update in range(2):
        for parameters, scale in ((ours.groups["lora"] + ours.groups["flow"], 1.0), ([*lora, *flow], 65536.0)):
            for name, parameter in zip(names, parameters, strict=True):
                parameter.grad = scale * (1 + update) * golden.expected[name]
        ours.update()
        scaler.scale(torch.zeros(()))  # makes the scale, 65536
        scaler.unscale_(theirs)
        nn.utils.clip_grad_norm_(lora, 1.0)
        nn.utils.clip_grad_norm_(flow, 1.0)
        scaler.step(theirs)
        theirs.step()
        scaler.update()
    for mine, other, before in zip(ours.groups["lora"] + ours.groups["flow"], [*lora, *flow], start, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
        assert not torch.equal(mine, before)
    steps = {int(state["step"]) for state in ours.algorithm.state.values()}
    assert steps == {4}
    assert Optimizer(golden.policy, None, once, config.flow, 10).applications == 1


def test_prompts_are_drawn_independently() -> None:
    numbers = assign_prompts(0, 0, 4000, 5, "independent")
    assert torch.equal(numbers[17:40], assign_prompts(0, 17, 23, 5, "independent"))
    assert not torch.equal(numbers, assign_prompts(4, 0, 4000, 5, "independent"))
    # χ² of 5 counts and of 25 pairs of neighbours: four standard deviations above their 4 and 24 degrees of freedom.
    pairs = 5 * numbers[::2] + numbers[1::2]
    for values, kinds in ((numbers, 5), (pairs, 25)):
        expected = len(values) / kinds
        chi2 = ((values.bincount(minlength=kinds) - expected) ** 2 / expected).sum().item()
        assert chi2 < kinds - 1 + 4 * (2 * (kinds - 1)) ** 0.5
    assert any(len(cycle.unique()) < 5 for cycle in numbers.split(5))
    prompts = RunPrompts(texts=[f"prompt {i}" for i in range(52)], trained=50, evaluated=range(50, 52))
    used = used_prompts(prompts, 3, 60, "independent").tolist()
    assert used == sorted({*assign_prompts(3, 0, 60, 50, "independent").tolist(), 50, 51})


@pytest.mark.parametrize("kind", ["unet", "conv"])
def test_a_flow_that_does_not_start_at_zero(kind: str) -> None:
    """All but the last layer's weights are as ever."""
    flows = [build_flow(kind, 4, 16, 0, start) for start in ("zero", "random")]
    named = [dict(flow.named_parameters()) for flow in flows]
    differ = {name for name in named[0] if not torch.equal(named[0][name], named[1][name])}
    last = {"unet": "unet.conv_out", "conv": "last"}[kind]
    assert differ == {f"{last}.weight"} and not named[1][f"{last}.bias"].any()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = [flow(x, torch.tensor([1, 5]), torch.ones(2, 3, 16)).abs().max() for flow in flows]
    assert outputs[0] == 0 < outputs[1]


@pytest.mark.slow
def test_a_run_is_the_authors_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their order of sampling and training written out, with plain AdamW, against the trainer. Float32 rounding: the steps
    are 1e-3 and six updates apply two of them each."""
    options, build = [], rewards.build_reward
    monkeypatch.setattr(rewards, "build_reward", lambda *given: options.append(given[2]) or build(*given))
    ours, theirs = (without_pictures(Trainer.from_config(compatible())) for _ in range(2))
    assert [(option.preprocess, option.precision) for option in options] == [("reference", "tf32")] * 2
    ours.train(tmp_path)

    parameters, epochs = theirs.policy.trainable(), theirs.config.num_rollouts
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    held: Transitions | None = None
    for epoch in range(-1, epochs):
        samples = None
        if epoch + 1 < epochs:  # they sample once more, and leave it
            theirs.components.buffer.clear()
            theirs.source.rollout(epoch + 1)
            samples = theirs.components.buffer.gather(theirs.components.buffer.transitions())
            expected = assign_prompts(0, 4 * (epoch + 1), 4, theirs.prompts.trained, "independent")
            assert samples.prompt.view(4, -1)[:, 0].tolist() == expected.tolist()
        if held is not None:
            for part in torch.arange(len(held)).chunk(2):
                theirs.step(held[part])
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.step()
                optimizer.zero_grad()
        held = samples
    moved = [parameter.abs().max().item() for name, parameter in theirs.policy.trained().items() if "lora_B" in name]
    assert min(moved) > 1e-3
    for mine, other in zip(ours.policy.trainable(), parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5)


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.applications = 0: must be at least 1"):
        OptimizerConfig(applications=0)
    with pytest.raises(ValueError, match=r"reward\.normalise = True \(it has False\)"):
        compatible(reward=RewardConfig(terms=("area=1",), normalise=True))
