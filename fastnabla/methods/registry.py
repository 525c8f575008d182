"""The training step of each method: how it is built, and what it costs.

All methods share sampler, buffer, kernels, policy, optimizer and trainer; `docs/objectives.md` compares them. A new
method is a step (`fastnabla.methods.accumulation`), an entry here and one in `fastnabla.config.methods`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from fastnabla.config.methods import METHODS
from fastnabla.config.train import TrainConfig
from fastnabla.methods.accumulation import Accumulation
from fastnabla.methods.adjoint import AdjointStep
from fastnabla.methods.dag import DetailedBalanceStep
from fastnabla.methods.dag_kl import KullbackLeiblerStep
from fastnabla.methods.ddpo import PolicyGradientStep
from fastnabla.methods.direct import DirectStep, Ending, last_step_redrawn, last_steps, late_prediction
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.passes import StepCost, matching_cost, planned_decodes, planned_passes
from fastnabla.methods.reference_target import ReferenceTargetStep
from fastnabla.methods.rollout_plan import RolloutPlan
from fastnabla.methods.velocity_matching import VelocityMatchingStep
from fastnabla.models.build import Networks
from fastnabla.models.decoder import RewardFunction
from fastnabla.models.policy import Policy
from fastnabla.objective.settings import Objective
from fastnabla.trajectories.draws import expected_draws
from fastnabla.transition import TransitionTable
from fastnabla.utils.require import require


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MethodStep:
    """How a method's step is built, and what it costs."""

    build: Callable[[TrainConfig, Networks, RewardFunction, Sequence[str]], Accumulation]
    """The step, from a configuration with planned memory settings, its networks, the reward and the prompts' texts."""
    cost: Callable[[TrainConfig], StepCost]
    """What one update's step costs."""
    graphs: Callable[[TrainConfig], int] = lambda config: 1
    """The number of UNet graphs that are alive at once for each row of a micro-batch."""
    sums_gradients: bool = False
    """Whether a micro-batch keeps a sum of the policy's gradients, beside those that it adds to it."""


def _transitions(config: TrainConfig) -> dict[str, float]:
    """Expected numbers of rows. "stratified" may draw the last step, which is kept in any case."""
    per_update = config.rollout.trajectories // config.rollout.updates
    last = expected_draws(config.rollout.draw, config.sampler.steps, config.drawn_steps)[-1].item()
    return {"inner": per_update * (config.drawn_steps + 1 - last), "last": per_update * last}


def _trajectories(config: TrainConfig) -> dict[str, float]:
    return {"trajectory": config.rollout.trajectories // config.rollout.updates}


def _over_epochs(first: float, later: float, epochs: int) -> float:
    """The mean over inner epochs of a cost in the first and in each later one."""
    return (first + (epochs - 1) * later) / epochs


def objective_of(config: TrainConfig) -> Objective:
    """The objective, whose target follows the reference only where there is one to follow, and then in every transition."""
    target = "reference" if config.follows_reference else "policy"
    return dataclasses.replace(config.objective, reverse_target=target, reverse_fraction=config.reverse_fraction)


def _balance(noising: bool) -> MethodStep:
    def build(config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]) -> Accumulation:
        arguments = (
            networks.policy,
            networks.flow,
            networks.gradient_decoder,
            reward,
            prompts,
            networks.table,
            objective_of(config),
            config.memory.micro_batch,
            config.backend,
            config.rollout.draw == "runs",
        )
        if config.follows_reference:
            return ReferenceTargetStep(*arguments, average=config.flow.average)
        return BalanceStep(*arguments, noising)

    def cost(config: TrainConfig) -> StepCost:
        rows, objective, with_flow, run, unshared = _transitions(config), objective_of(config), config.has_flow, 1, 1.0
        if config.rollout.draw == "runs":
            run = config.drawn_steps
            unshared += (run - 1) / (config.sampler.steps - 1)  # runs that wrap around to the first step
        settings, epochs = (objective, with_flow, run, unshared, noising), config.rollout.epochs
        first, later = planned_passes(*settings), planned_passes(*settings, cached=True)
        passes = [_over_epochs(one, other, epochs) for one, other in zip(first, later, strict=True)]
        decodes = planned_decodes(objective, with_flow, run, unshared)
        drawn = objective.reverse_fraction if objective.reverse_weight > 0 else 0
        flow_passes = 3 * (rows["inner"] * (1 + drawn * unshared / run) + rows["last"])
        if config.follows_reference:  # g(x') is forward only
            flow_passes = 4 * rows["inner"] + 3 * rows["last"]
        return StepCost(
            rows=rows,
            passes=dict(zip(rows, passes, strict=True)),
            decodes=dict(zip(rows, decodes, strict=True)),
            flow_passes=flow_passes,
        )

    def graphs(config: TrainConfig) -> int:
        """Second derivatives keep the backward graph too, with attention's matrices: 2.3 times the memory (testbed)."""
        return 3 if config.objective.reverse_second_order else 1

    return MethodStep(build=build, cost=cost, graphs=graphs)


def _direct(
    ending: Callable[[TrainConfig, Policy], Ending],
    passes: Callable[[TrainConfig], float],
    copies: Callable[[TrainConfig], int] = lambda config: 1,
    graphs: Callable[[TrainConfig], int] | None = None,
) -> MethodStep:
    """The step of a method that samples its own trajectories.

    Args:
        ending: how a trajectory ends in the latents that are rewarded.
        passes: U per trajectory.
        copies: rewarded latents per trajectory.
        graphs: UNet graphs per trajectory, at most; None for as many as `copies`.
    """

    def build(config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]) -> Accumulation:
        return DirectStep(
            networks.policy,
            networks.gradient_decoder,
            reward,
            prompts,
            networks.table,
            networks.sample_shape,
            ending(config, networks.policy),
            config.memory.micro_batch,
            config.backend,
            config.direct.kl,
        )

    def cost(config: TrainConfig) -> StepCost:
        each = {"passes": passes(config), "decodes": copies(config)}
        return StepCost(rows=_trajectories(config), **{name: {"trajectory": value} for name, value in each.items()})

    return MethodStep(build=build, cost=cost, graphs=graphs or copies)


def _refl_passes(config: TrainConfig) -> float:
    """Its mean: i is uniform from the first late step to T − 1. A pass without guidance is half a U."""
    steps, direct = config.sampler.steps, config.direct
    without_guidance = direct.guidance_scale == 1 and config.sampler.guidance_scale != 1
    return ((direct.first_late(steps) + steps - 1) / 2 + 2) * (0.5 if without_guidance else 1)


def _refl_ending(config: TrainConfig, policy: Policy) -> Ending:
    guidance_scale = config.direct.guidance_scale
    require(
        guidance_scale is None or not policy.guidance_is_input,
        "direct.guidance_scale",
        guidance_scale,
        "this network has guidance distilled into it and takes sampler.guidance_scale as an input; leave it None.",
    )
    return late_prediction(config.direct.first_late(config.sampler.steps), guidance_scale)


def _draft_ending(config: TrainConfig, policy: Policy) -> Ending:
    direct = config.direct
    return last_steps(direct.k, random=direct.truncation == "random", penalised=direct.kl > 0)


def _draft_passes(config: TrainConfig) -> float:
    """Its mean, if K is random."""
    direct = config.direct
    k = (1 + direct.k) / 2 if direct.truncation == "random" else direct.k
    return config.sampler.steps + k * (2 if direct.kl else 1)


def _build_ddpo(
    config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]
) -> Accumulation:
    expected = expected_draws(config.rollout.draw, len(networks.table), config.drawn_steps)
    settings = (len(prompts), config.policy_gradient, expected, config.memory.micro_batch, config.backend)
    return PolicyGradientStep(networks.policy, networks.table, *settings)


def _build_adjoint(
    config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]
) -> Accumulation:
    return AdjointStep(
        networks.policy,
        networks.gradient_decoder,
        reward,
        prompts,
        networks.table,
        networks.sample_shape,
        config.objective,
        config.rollout.draw,
        config.drawn_steps,
        config.memory.micro_batch,
        config.backend,
    )


def _adjoint_cost(config: TrainConfig) -> StepCost:
    """T U to sample, 2 T − 1 for the adjoints after the first step, and 2 for each regressed step."""
    passes = 3 * config.sampler.steps - 1 + 2 * (config.drawn_steps + 1)
    return StepCost(rows=_trajectories(config), passes={"trajectory": passes}, decodes={"trajectory": 1})


def _rollout_plan(config: TrainConfig) -> RolloutPlan:
    rollout = config.rollout
    return RolloutPlan(rollouts=config.num_rollouts, updates=rollout.updates_per_rollout, replay=rollout.replay)


def _build_dag(config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]) -> Accumulation:
    build = DetailedBalanceStep
    if config.method == "dag-kl":
        build = functools.partial(KullbackLeiblerStep, config.policy_gradient)
    return build(
        networks.policy,
        networks.flow,
        networks.gradient_decoder,
        reward,
        prompts,
        networks.table,
        config.objective,
        config.memory.micro_batch,
        config.backend,
        _rollout_plan(config),
    )


def _dag_cost(config: TrainConfig) -> StepCost:
    rows = _transitions(config)
    more = 1 - _rollout_plan(config).on_policy_share if config.method == "dag-kl" else 0
    return StepCost(
        rows=rows,
        passes={"inner": 3 + more, "last": 2 + more},
        decodes={"inner": 1, "last": 0.5},
        flow_passes=3 * (2 * rows["inner"] + rows["last"]),
    )


def matching_objective(config: TrainConfig, is_flow_matching: bool) -> Objective:
    """The objective of `vgg-flow` and `rsm`, with the method's own values of the fields that it does not have.

    VGG-Flow has no trust region. Reward Score Matching takes ∇r at finished samples, with γ = 1 − t for flow models; for
    diffusion models γ = 1 and both terms of the residual are in units of the step's noise.
    """
    objective = dataclasses.replace(config.objective, prior_weight=1.0, reverse_second_order=False)
    if config.method == "vgg-flow":
        return dataclasses.replace(objective, trust_region_weight=0.0)
    gamma = "sqrt_alpha_bar" if is_flow_matching else "constant"
    return dataclasses.replace(objective, reward_gradient="terminal", gamma=gamma, weighting="sigma")


def require_flow_model(config: TrainConfig, table: TransitionTable) -> None:
    """Check that a method for flow models alone has one, whose sampler has the steps `table`.

    Raises:
        ValueError: it does not.
    """
    require(
        table.is_flow_matching or not METHODS[config.method].needs_flow_model,
        "method",
        config.method,
        f"matches velocities, and {config.model.name} is not a model of flow matching; use rsm.",
    )


def _build_matching(
    config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]
) -> Accumulation:
    require_flow_model(config, networks.table)
    table, is_flow = networks.table, networks.table.is_flow_matching
    policy, objective = networks.policy, matching_objective(config, is_flow)
    settings = (networks.gradient_decoder, reward, prompts, table, objective, config.memory.micro_batch, config.backend)
    return VelocityMatchingStep(policy, *settings) if is_flow else BalanceStep(policy, None, *settings)


def _matching_cost(config: TrainConfig) -> StepCost:
    """Reward Score Matching costs the same for both kinds of models."""
    reward_gradient = "terminal" if config.method == "rsm" else config.objective.reward_gradient
    first, decodes = matching_cost(reward_gradient)
    later, _ = matching_cost(reward_gradient, cached=True)
    rows, passes = _transitions(config), _over_epochs(first, later, config.rollout.epochs)
    return StepCost(rows=rows, passes=dict.fromkeys(rows, passes), decodes=dict(zip(rows, decodes, strict=True)))


STEPS: dict[str, MethodStep] = {
    "residual-db": _balance(noising=False),
    "db": _balance(noising=True),
    "adjoint": MethodStep(build=_build_adjoint, cost=_adjoint_cost, sums_gradients=True),
    "refl": _direct(ending=_refl_ending, passes=_refl_passes),
    "draft": _direct(ending=_draft_ending, passes=_draft_passes, graphs=lambda config: config.direct.k),
    "draft-lv": _direct(
        ending=lambda config, policy: last_step_redrawn(config.direct.redraws),
        passes=lambda config: config.sampler.steps + 1 + 2 * config.direct.redraws,
        copies=lambda config: 1 + config.direct.redraws,
    ),
    "ddpo": MethodStep(
        build=_build_ddpo,
        cost=lambda config: StepCost(
            rows=_transitions(config), passes={"inner": 2, "last": 2}, decodes={"inner": 0, "last": 0}
        ),
    ),
    "dag": MethodStep(build=_build_dag, cost=_dag_cost),
    "dag-kl": MethodStep(build=_build_dag, cost=_dag_cost),
    "vgg-flow": MethodStep(build=_build_matching, cost=_matching_cost),
    "rsm": MethodStep(build=_build_matching, cost=_matching_cost),
}
"""Name (`--method`) → step; the names are those of `fastnabla.config.methods.METHODS`."""
