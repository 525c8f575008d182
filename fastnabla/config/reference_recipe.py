"""`--reference-compat`: the recipe of the authors' implementation (github.com/lzzcd001/nabla-gfn).

Each setting in its configuration has a counterpart here. `DEPARTURES` are what its code does beyond its configuration, on
purpose or by mistake; these settings of fastnabla are off by default. docs/stable-diffusion.md explains each, and lists the
mistakes that are not reproduced.
"""

from collections.abc import Mapping
from typing import Any

from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import LORA_TARGETS, FlowConfig, PromptConfig, RewardConfig
from fastnabla.config.training_sections import OptimizerConfig, RolloutConfig

DEPARTURES: dict[str, Any] = {
    "rollout.replay": 1,
    "optimizer.applications": 2,
    "prompts.draw": "independent",
    "flow.start": "random",
    "reward.preprocess": "reference",
    "reward.precision": "tf32",
}
"""Field → the reference implementation's value, where fastnabla's default differs."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("residual-db", "db"),
    "model.quantise": ("none",),
    "model.tiny_decoder": (None,),
    "sampler.scheduler": ("ddim",),
    "sampler.spacing": ("leading", None),
    "sampler.min_sigma": (None,),
    "objective.reward_gradient": ("lookahead",),
    "objective.gamma": ("alpha_bar", "sqrt_alpha_bar"),
    "objective.weighting": ("score",),
    "objective.reverse_target": ("policy",),
    "objective.reverse_fraction": (1.0,),
    "objective.reverse_second_order": (False,),
    "rollout.draw": ("stratified", "uniform"),
    "rollout.epochs": (1,),
    "lora.targets": (LORA_TARGETS,),
    "flow.kind": ("unet", "none"),
    "flow.average": (None,),
    "optimizer.name": ("adamw",),
    "optimizer.schedule": ("constant",),
    "optimizer.warmup": (0,),
    "memory.output_block": (None,),
    "reward.normalise": (False,),
    "reward.clip": (None,),
}
"""Field → the values that the reference implementation supports, where fastnabla supports more."""


_DEFAULTS = {
    "rollout": RolloutConfig(),
    "optimizer": OptimizerConfig(),
    "prompts": PromptConfig(),
    "flow": FlowConfig(),
    "reward": RewardConfig(),
}


def reference_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the recipe sets: `DEPARTURES`.

    Args:
        values: a configuration, by dotted name.

    Raises:
        ValueError: the reference implementation does not have some of the settings; the message names all of them.
    """
    refused = {name: allowed for name, allowed in CHOICES.items() if values[name] not in allowed}
    for name, theirs in DEPARTURES.items():
        section, _, field = name.partition(".")
        # Neither fastnabla's default nor the reference's value.
        if values[name] not in (theirs, getattr(_DEFAULTS[section], field)):
            refused[name] = (theirs,)
    if values["lora.rank"] == 0:
        refused["lora.rank"] = ("a LoRA",)
    refused = {name: theirs for name, theirs in refused.items() if name not in METHODS[values["method"]].without}
    if refused:
        named = ", ".join(f"{n} = {values[n]!r} (it has {' or '.join(map(str, refused[n]))})" for n in refused)
        raise ValueError(
            f"reference_compat = True: the reference implementation does not have {named}. Change these settings, or "
            "leave reference_compat out."
        )
    return DEPARTURES
