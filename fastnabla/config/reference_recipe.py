"""`--reference-compat`: the recipe of the authors' implementation (github.com/lzzcd001/nabla-gfn), to measure what differs.

Its settings are those that have a name in its configuration. What its code does besides, on purpose or by mistake, is
`DEPARTURES` here: settings of fastnabla that are off by default. docs/stable-diffusion.md explains each, and says which of
its mistakes are not repeated.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fastnabla.models.lora import LORA_TARGETS

if TYPE_CHECKING:
    from fastnabla.config.train import TrainConfig

DEPARTURES: dict[str, Any] = {
    "rollout.replay": 1,
    "optimizer.applications": 2,
    "prompts.draw": "independent",
    "flow.start": "random",
    "reward.preprocess": "reference",
    "reward.precision": "tf32",
}
"""Field → what the reference implementation has, where fastnabla's default is another."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("residual-db", "db"),
    "model.tiny_decoder": (None,),
    "sampler.scheduler": ("ddim",),
    "objective.reward_gradient": ("lookahead",),
    "objective.gamma": ("alpha_bar", "sqrt_alpha_bar"),
    "objective.weighting": ("score",),
    "objective.reverse_second_order": (False,),
    "rollout.draw": ("stratified", "uniform"),
    "rollout.epochs": (1,),
    "lora.targets": (LORA_TARGETS,),
    "flow.kind": ("unet", "none"),
    "optimizer.name": ("adamw",),
    "optimizer.schedule": ("constant",),
    "optimizer.warmup": (0,),
    "memory.output_block": (None,),
    "reward.normalise": (False,),
    "reward.clip": (None,),
}
"""Field → all that it has of what fastnabla has."""


def reference_recipe(config: TrainConfig) -> dict[str, Any]:
    """The sections of `config` that the recipe changes, changed: those of `DEPARTURES`.

    Raises:
        ValueError: a setting is none that the reference implementation has; the message names all of them.
    """
    found = {name: _value(config, name) for name in (*CHOICES, *DEPARTURES)}
    refused = {name: CHOICES[name] for name in CHOICES if found[name] not in CHOICES[name]}
    # What is neither as by default nor as there was asked for.
    defaults = {name: _default(config, name) for name in DEPARTURES}
    refused |= {name: (there,) for name, there in DEPARTURES.items() if found[name] not in (there, defaults[name])}
    if config.lora.rank == 0:
        found["lora.rank"], refused["lora.rank"] = 0, ("a LoRA",)
    if refused:
        named = ", ".join(f"{n} = {found[n]!r} (it has {' or '.join(map(str, refused[n]))})" for n in refused)
        raise ValueError(
            f"reference_compat = True: the reference implementation does not have {named}. Give what it has, or leave "
            "reference_compat out."
        )
    changes: dict[str, dict[str, Any]] = {}
    for name, value in DEPARTURES.items():
        section, _, field = name.partition(".")
        changes.setdefault(section, {})[field] = value
    return {section: dataclasses.replace(getattr(config, section), **values) for section, values in changes.items()}


def _value(config: TrainConfig, name: str) -> Any:
    section, _, field = name.partition(".")
    value = getattr(config, section)
    return getattr(value, field) if field else value


def _default(config: TrainConfig, name: str) -> Any:
    section, _, field = name.partition(".")
    return next(f.default for f in dataclasses.fields(getattr(config, section)) if f.name == field)
