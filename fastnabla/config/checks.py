"""Checks of several fields together. A check applies to the methods that have all of its fields."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fastnabla.config.drawn_steps import fraction_remedy
from fastnabla.utils.require import require


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """A condition on the values of several fields."""

    fields: tuple[str, ...]
    """The fields, as SECTION.FIELD. An error names the first."""
    remedy: Callable[..., str | None]
    """From the values of `fields`, in this order: the end of the error message, or None if the values fit together."""


def check_together(values: Mapping[str, Any], without: tuple[str, ...]) -> None:
    """Run all checks that apply to a method.

    Args:
        values: a configuration, by dotted name.
        without: the fields that the method does not have.

    Raises:
        ValueError: fields contradict each other. The message names the first one, its value and a remedy.
    """
    for check in CHECKS:
        if not any(field in without for field in check.fields):
            remedy = check.remedy(*(values[field] for field in check.fields))
            require(remedy is None, check.fields[0], values[check.fields[0]], str(remedy))


def _through_steps(k: int, steps: int) -> str | None:
    return None if k <= steps else f"must be at most sampler.steps = {steps}; use {steps} or less."


def _has_guidance(direct: float | None, sampler: float) -> str | None:
    if direct in (None, 1) or sampler != 1:
        return None
    return "sampler.guidance_scale = 1 turns guidance off, in training too; leave it None."


def _trains_flow(reverse_weight: float, reverse_target: str, kind: str) -> str | None:
    if kind == "none" or reverse_target != "reference" or reverse_weight > 0:
        return None
    return (
        "nothing else trains the flow with objective.reverse_target = reference; use a positive weight, or --flow.kind "
        "none."
    )


def _depends_on_policy(second_order: bool, reverse_target: str) -> str | None:
    if not second_order or reverse_target == "policy":
        return None
    return (
        "the reverse residual does not depend on the policy if objective.reverse_target = 'reference'; leave it False, "
        "or use 'policy'."
    )


def _is_within_window(min_count: int, window: int) -> str | None:
    return None if min_count <= window else f"must be at most policy_gradient.window = {window}; use {window} or less."


def _has_shards(shard: bool | None, rank: int) -> str | None:
    if not (shard and rank):
        return None
    return (
        f"only a LoRA of a few MB is trained (lora.rank = {rank}), which is not sharded. Leave it None, or train all "
        "parameters with --lora.rank 0."
    )


def _has_lora(quantise: str, rank: int) -> str | None:
    if quantise == "none" or rank:
        return None
    return "quantised weights cannot be trained (lora.rank = 0); use none, or train a LoRA, such as --lora.rank 8."


def _is_deterministic(attention: str, deterministic: bool) -> str | None:
    if not (deterministic and attention == "xformers"):
        return None
    return "its backward pass may not be deterministic; use sdpa with deterministic = True."


def _is_whole_rollouts(updates: int, each: int, epochs: int) -> str | None:
    rollout = each * epochs
    if updates % rollout == 0:
        return None
    product = "rollout.updates" if epochs == 1 else "rollout.updates · rollout.epochs"
    return f"must be a multiple of {product} = {rollout}; use {-(-updates // rollout) * rollout}."


CHECKS = (
    Check(("direct.k", "sampler.steps"), _through_steps),
    Check(("direct.guidance_scale", "sampler.guidance_scale"), _has_guidance),
    Check(("objective.reverse_weight", "objective.reverse_target", "flow.kind"), _trains_flow),
    Check(("objective.reverse_second_order", "objective.reverse_target"), _depends_on_policy),
    Check(("policy_gradient.min_count", "policy_gradient.window"), _is_within_window),
    Check(("memory.shard", "lora.rank"), _has_shards),
    Check(("model.quantise", "lora.rank"), _has_lora),
    Check(("compute.attention", "deterministic"), _is_deterministic),
    Check(("updates", "rollout.updates", "rollout.epochs"), _is_whole_rollouts),
    Check(("rollout.fraction", "sampler.steps", "rollout.draw"), fraction_remedy),
)
