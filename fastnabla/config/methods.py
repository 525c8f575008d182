"""What each finetuning method needs, without importing torch.

`fastnabla.methods.registry` has the training step of each method. `docs/objectives.md`
compares the methods.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from fastnabla.config.fields import names_of
from fastnabla.config.method_sections import Direct, PolicyGradient
from fastnabla.config.model_sections import FlowConfig
from fastnabla.objective.settings import Objective
from fastnabla.utils.require import require

MethodName = Literal[
    "residual-db", "db", "adjoint", "refl", "draft", "draft-lv", "ddpo", "dag", "dag-kl", "vgg-flow", "rsm"
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What the configuration, the trainer and the planner need to know about a method."""

    stores: bool = True
    """Whether it learns from the stored transitions of a rollout. If not, its step samples its own trajectories."""
    has_flow: bool = False
    """Whether it trains a flow network."""
    has_reference: bool = False
    """Whether its step runs the pretrained network, whose outputs later inner epochs read from a cache."""
    has_densities: bool = True
    """Whether it uses the densities of the sampler's steps, or their noise. If not, it also learns from an ODE's trajectories."""
    reverses_noising: bool = False
    """Whether its backward policy is DDPM's noising kernel, which reverses DDPM's steps only."""
    needs_flow_model: bool = False
    """Whether it is for models of flow matching alone."""
    without: tuple[str, ...] = ()
    """Fields, as SECTION.FIELD, that have no effect on it."""
    only: Mapping[str, tuple[tuple[Any, ...], str]] = dataclasses.field(default_factory=dict)
    """Fields that it restricts: SECTION.FIELD → (allowed values, end of the error message for any other)."""

    def accepts(self, name: str, value: Any) -> bool:
        """Whether the field `name` has an effect on the method and may have this value."""
        return name not in self.without and (name not in self.only or value in self.only[name][0])

    def check(self, values: Mapping[str, Any]) -> None:
        """Check a configuration, given as its `dotted` values.

        Raises:
            ValueError: a field has a value that the method does not allow.
        """
        for name, (allowed, remedy) in self.only.items():
            require(values[name] in allowed, name, values[name], f"method = {values['method']!r} {remedy}")
        require(
            not (self.has_densities and values["sampler.scheduler"] == "euler"),
            "sampler.scheduler",
            values["sampler.scheduler"],
            f"method = {values['method']!r} needs steps with noise; use ddim.",
        )


_DIRECT = names_of("direct", Direct)
_POLICY_GRADIENT = names_of("policy_gradient", PolicyGradient)
_FLOW = names_of("flow", FlowConfig)
_FOLLOWING = ("objective.reverse_target", "flow.average")
"""Fields of a flow that follows the pretrained policy."""
_OF_DAG = ("gamma", "trust_region_weight", "beta_schedule")
"""Fields of the objective that DAG uses besides β."""
_NOISING = {
    "sampler.eta": ((1,), "uses DDPM's noising process as the backward policy, which needs η = 1; set it to 1."),
}
_LEARNED = {"flow.kind": (("unet", "conv"), "learns a flow; choose unet or conv.")}
_EXACT_OUTPUTS = {
    "memory.output_block": (
        (None,),
        "computes density ratios from the sampled outputs and needs them in float32; leave it None.",
    ),
}
_ONCE = "samples in its step and stores no trajectories to reuse; leave it at {}."
_UNSTORED = {
    "reward.normalise": ((False,), "has no rollout from which to measure the spread of rewards; leave it off."),
    "rollout.replay": ((0,), _ONCE.format(0)),
    "rollout.epochs": ((1,), _ONCE.format(1)),
}
_MEMORYLESS = {
    "sampler.eta": ((1,), "has its target only where x_T does not depend on x_0, which needs η = 1; set it to 1."),
}


def _objective_but(*names: str) -> tuple[str, ...]:
    """The fields of the objective except `names` and β, which `fastnabla.evaluate` uses for every method."""
    return names_of("objective", Objective, but=("beta", *names))


def _differentiates_sampler(*settings: str) -> Method:
    """A method that differentiates the reward through the sampling in its step; `settings` are its fields of `direct`."""
    return Method(
        stores=False,
        without=(
            *names_of("direct", Direct, but=settings),
            *_objective_but(),
            *_POLICY_GRADIENT,
            *_FLOW,
            "rollout.fraction",
            "rollout.draw",
            "memory.buffer",
            "memory.output_block",
        ),
        only=_UNSTORED,
    )


METHODS: dict[str, Method] = {
    "residual-db": Method(
        has_flow=True, has_reference=True, without=(*_DIRECT, *_POLICY_GRADIENT, "objective.beta_schedule")
    ),
    "db": Method(
        has_flow=True,
        reverses_noising=True,
        without=(*_DIRECT, *_POLICY_GRADIENT, *_FOLLOWING, "objective.beta_schedule"),
        only=_NOISING | {"objective.prior_weight": ((1,), "has no pretrained policy to weight; leave it at 1.")},
    ),
    "adjoint": Method(
        stores=False,
        without=(
            *_DIRECT,
            *_objective_but("gamma"),
            *_POLICY_GRADIENT,
            *_FLOW,
            "memory.buffer",
            "memory.output_block",
        ),
        only=_UNSTORED | _MEMORYLESS,
    ),
    "refl": _differentiates_sampler("late", "guidance_scale"),
    "draft": _differentiates_sampler("k", "truncation", "kl"),
    "draft-lv": _differentiates_sampler("redraws"),
    "ddpo": Method(
        without=(*_DIRECT, *_objective_but(), *_FLOW),
        only=_EXACT_OUTPUTS,
    ),
    "dag": Method(
        has_flow=True,
        reverses_noising=True,
        without=(*_objective_but(*_OF_DAG), *_DIRECT, *_POLICY_GRADIENT, "flow.average"),
        only=_NOISING | _LEARNED,
    ),
    "dag-kl": Method(
        has_flow=True,
        reverses_noising=True,
        without=(
            *_objective_but(*_OF_DAG),
            *_DIRECT,
            *names_of("policy_gradient", PolicyGradient, but=("clip", "advantage_clip")),
            "flow.average",
        ),
        only=_NOISING | _LEARNED | _EXACT_OUTPUTS,
    ),
    "vgg-flow": Method(
        has_reference=True,
        has_densities=False,
        needs_flow_model=True,
        without=(*_DIRECT, *_objective_but("reward_gradient", "gamma"), *_POLICY_GRADIENT, *_FLOW),
        only={
            "objective.reward_gradient": (
                ("lookahead", "lookahead_detached"),
                "takes the reward's gradient at predicted clean samples; use lookahead_detached, as the authors' code does, or "
                "lookahead.",
            )
        },
    ),
    "rsm": Method(
        has_reference=True,
        has_densities=False,
        without=(*_DIRECT, *_objective_but("trust_region_weight"), *_POLICY_GRADIENT, *_FLOW),
    ),
}
"""Name (`--method`) → what it needs."""
