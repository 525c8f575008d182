"""The methods of finetuning, by name: what builds a method's step, what it needs, and what the step costs.

They share sampler, buffer, kernels, policy, optimizer and trainer; `docs/objectives.md` compares them. A new one is a step
(`fastnabla.methods.accumulation`) and an entry here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastnabla.config.sections import FlowConfig
from fastnabla.methods.accumulation import Accumulation
from fastnabla.methods.dag import DetailedBalanceStep
from fastnabla.methods.ddpo import PolicyGradientStep
from fastnabla.methods.direct import DirectStep, Ending, last_step_redrawn, last_steps, late_prediction
from fastnabla.methods.nabla_db import BalanceStep
from fastnabla.methods.passes import StepCost, planned_decodes, planned_passes
from fastnabla.models.decoder import RewardFunction
from fastnabla.objective.direct import Direct
from fastnabla.objective.policy_gradient import PolicyGradient
from fastnabla.objective.settings import Objective
from fastnabla.trajectories.draws import expected_draws
from fastnabla.utils.require import require

if TYPE_CHECKING:
    from fastnabla.config.train import TrainConfig
    from fastnabla.models.build import Networks


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What the trainer, the planner and the cost model have to know of a method."""

    build: Callable[[TrainConfig, Networks, RewardFunction, Sequence[str]], Accumulation]
    """The step, of a configuration whose memory settings are planned, its networks, the reward and the prompts' texts."""
    cost: Callable[[TrainConfig], StepCost]
    """Of an update's step."""
    stores: bool = True
    """Whether it learns from stored transitions of a rollout; else its step samples on its own."""
    has_flow: bool = False
    """Whether a flow network is trained too."""
    has_reference: bool = False
    """Whether its step runs the pretrained network, whose part later inner epochs have from a cache."""
    graphs: Callable[[TrainConfig], int] = lambda config: 1
    """UNet graphs of each row of a micro-batch that are alive at once."""
    check: Callable[[TrainConfig], None] = lambda config: None
    """Raises ValueError if the configuration does not suit it."""
    without: tuple[str, ...] = ()
    """Fields, SECTION.FIELD, that have no part in it."""


def _fields(section: str, of: type, but: Sequence[str] = ()) -> tuple[str, ...]:
    return tuple(f"{section}.{field.name}" for field in dataclasses.fields(of) if field.name not in but)


_DIRECT = _fields("direct", Direct)
_POLICY_GRADIENT = _fields("policy_gradient", PolicyGradient)
_FLOW = _fields("flow", FlowConfig)
_TARGET = ("beta",)
"""Of the objective: what `fastnabla.evaluate` holds every method against."""


def _transitions(config: TrainConfig) -> dict[str, float]:
    """In expectation: "stratified" draws may be of the last step too, which is kept besides them."""
    per_update = config.rollout.trajectories // config.rollout.updates
    last = expected_draws(config.rollout.draw, config.sampler.steps, config.drawn_steps)[-1].item()
    return {"inner": per_update * (config.drawn_steps + 1 - last), "last": per_update * last}


def _trajectories(config: TrainConfig) -> dict[str, float]:
    return {"trajectory": config.rollout.trajectories // config.rollout.updates}


def _balance(noising: bool) -> Method:
    def build(config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]) -> Accumulation:
        return BalanceStep(
            networks.policy,
            networks.flow,
            networks.gradient_decoder,
            reward,
            prompts,
            networks.table,
            config.objective,
            config.memory.micro_batch,
            config.backend,
            reuse_passes=config.rollout.draw == "runs",
            noising=noising,
        )

    def cost(config: TrainConfig) -> StepCost:
        rows, objective, with_flow, run, tails = _transitions(config), config.objective, config.has_flow, 1, 1.0
        if config.rollout.draw == "runs":
            run = config.drawn_steps
            tails += (run - 1) / (config.sampler.steps - 1)  # runs that go on at the first step
        settings, epochs = (objective, with_flow, run, tails, noising), config.rollout.epochs
        first, later = planned_passes(*settings), planned_passes(*settings, cached=True)
        passes = [(one + (epochs - 1) * other) / epochs for one, other in zip(first, later, strict=True)]
        decodes = planned_decodes(objective, with_flow, run, tails)
        flow_passes = 3 * (rows["inner"] * (1 + tails / run if objective.reverse_weight > 0 else 1) + rows["last"])
        return StepCost(
            rows=rows,
            passes=dict(zip(rows, passes, strict=True)),
            decodes=dict(zip(rows, decodes, strict=True)),
            flow_passes=flow_passes,
        )

    def check(config: TrainConfig) -> None:
        if noising:
            _require_noising(config)
            require(
                config.objective.prior_weight == 1,
                "objective.prior_weight",
                config.objective.prior_weight,
                "method = 'db' has no pretrained policy to weigh; leave it at 1.",
            )

    def graphs(config: TrainConfig) -> int:
        """A graph, and that of its backward pass: 2.3 times the memory on the testbed, attention's matrices included."""
        return 3 if config.objective.reverse_second_order else 1

    return Method(
        build=build,
        cost=cost,
        has_flow=True,
        has_reference=not noising,
        graphs=graphs,
        check=check,
        without=_DIRECT + _POLICY_GRADIENT,
    )


def _require_noising(config: TrainConfig) -> None:
    require(
        config.sampler.eta == 1,
        "sampler.eta",
        config.sampler.eta,
        f"method = {config.method!r} balances the sampler with DDPM's noising kernel, which reverses steps with η = 1 alone.",
    )


def _direct(
    ending: Callable[[TrainConfig], Ending],
    passes: Callable[[TrainConfig], float],
    reads: str,
    copies: Callable[[TrainConfig], int] = lambda config: 1,
    graphs: Callable[[TrainConfig], int] | None = None,
    check: Callable[[TrainConfig], None] = lambda config: None,
) -> Method:
    """A method that samples on its own.

    Args:
        ending: what is rewarded.
        passes: U a trajectory.
        reads: the one of the settings `direct` that it has.
        copies: latents that are rewarded of each.
        graphs: UNet graphs of each; as many as `copies` if None.
        check: as `Method.check`.
    """

    def build(config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]) -> Accumulation:
        return DirectStep(
            networks.policy,
            networks.gradient_decoder,
            reward,
            prompts,
            networks.table,
            networks.sample_shape,
            ending(config),
            config.memory.micro_batch,
            config.backend,
        )

    def cost(config: TrainConfig) -> StepCost:
        each = {"passes": passes(config), "decodes": copies(config)}
        return StepCost(rows=_trajectories(config), **{name: {"trajectory": value} for name, value in each.items()})

    def check_all(config: TrainConfig) -> None:
        require(
            not config.reward.normalise,
            "reward.normalise",
            config.reward.normalise,
            f"method = {config.method!r} has no rollout whose rewards could be seen before they are trained on.",
        )
        for name, only in (("replay", 0), ("epochs", 1)):
            value = getattr(config.rollout, name)
            problem = f"method = {config.method!r} samples in its step, and stores nothing to learn from again; leave it {only}."
            require(value == only, f"rollout.{name}", value, problem)
        check(config)

    without = (
        *_fields("direct", Direct, but=[reads]),
        *_fields("objective", Objective, but=_TARGET),
        *_POLICY_GRADIENT,
        *_FLOW,
        "rollout.fraction",
        "rollout.draw",
        "memory.buffer",
        "memory.output_block",
    )
    return Method(build=build, cost=cost, stores=False, graphs=graphs or copies, check=check_all, without=without)


def _check_draft(config: TrainConfig) -> None:
    steps = config.sampler.steps
    require(config.direct.k <= steps, "direct.k", config.direct.k, f"must be at most sampler.steps = {steps}.")


def _refl_passes(config: TrainConfig) -> float:
    """Its average: i is uniform from the first late step to T − 1."""
    steps = config.sampler.steps
    return (config.direct.first_late(steps) + steps - 1) / 2 + 2


def _build_ddpo(
    config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]
) -> Accumulation:
    expected = expected_draws(config.rollout.draw, len(networks.table), config.drawn_steps)
    settings = (len(prompts), config.policy_gradient, expected, config.memory.micro_batch, config.backend)
    return PolicyGradientStep(networks.policy, networks.table, *settings)


def _check_ddpo(config: TrainConfig) -> None:
    require(
        config.memory.output_block is None,
        "memory.output_block",
        config.memory.output_block,
        "method = 'ddpo' needs the outputs it sampled with as they were, for the ratios of densities; leave it None.",
    )


def _build_dag(config: TrainConfig, networks: Networks, reward: RewardFunction, prompts: Sequence[str]) -> Accumulation:
    return DetailedBalanceStep(
        networks.policy,
        networks.flow,
        networks.gradient_decoder,
        reward,
        prompts,
        networks.table,
        config.objective,
        config.memory.micro_batch,
        config.backend,
    )


def _dag_cost(config: TrainConfig) -> StepCost:
    rows = _transitions(config)
    return StepCost(
        rows=rows,
        passes={"inner": 3, "last": 2},
        decodes={"inner": 1, "last": 0.5},
        flow_passes=3 * (2 * rows["inner"] + rows["last"]),
    )


def _check_dag(config: TrainConfig) -> None:
    _require_noising(config)
    require(config.flow.kind != "none", "flow.kind", config.flow.kind, "method = 'dag' learns a flow; name a network.")


METHODS: dict[str, Method] = {
    "residual-db": _balance(noising=False),
    "db": _balance(noising=True),
    "refl": _direct(
        ending=lambda config: late_prediction(config.direct.first_late(config.sampler.steps)),
        passes=_refl_passes,
        reads="late",
    ),
    "draft": _direct(
        ending=lambda config: last_steps(config.direct.k),
        passes=lambda config: config.sampler.steps + config.direct.k,
        reads="k",
        graphs=lambda config: config.direct.k,
        check=_check_draft,
    ),
    "draft-lv": _direct(
        ending=lambda config: last_step_redrawn(config.direct.redraws),
        passes=lambda config: config.sampler.steps + 2 * config.direct.redraws,
        reads="redraws",
        copies=lambda config: config.direct.redraws,
    ),
    "ddpo": Method(
        build=_build_ddpo,
        cost=lambda config: StepCost(
            rows=_transitions(config), passes={"inner": 2, "last": 2}, decodes={"inner": 0, "last": 0}
        ),
        check=_check_ddpo,
        without=(*_DIRECT, *_fields("objective", Objective, but=_TARGET), *_FLOW),
    ),
    "dag": Method(
        build=_build_dag,
        cost=_dag_cost,
        has_flow=True,
        check=_check_dag,
        without=(
            *_fields("objective", Objective, but=(*_TARGET, "gamma", "trust_region_weight")),
            *_DIRECT,
            *_POLICY_GRADIENT,
        ),
    ),
}
"""Name (`--method`) → method."""
