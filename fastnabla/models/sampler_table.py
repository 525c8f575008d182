"""The sampler of a run as a table to print: every value, and whether it is the checkpoint's or the run's."""

import inspect
from typing import Any

from diffusers import SchedulerMixin
from rich.table import Table

from fastnabla.config.model_sections import ModelConfig, SamplerConfig
from fastnabla.models.noise_schedule import is_flow_matching, schedule_of, shipped_scheduler
from fastnabla.models.sampler import FIXED, scheduler_of
from fastnabla.transition import TransitionTable


def sampler_table(model: ModelConfig, config: SamplerConfig, steps: TransitionTable) -> Table:
    """The values of the sampler `config` for the checkpoint `model`, and where each comes from.

    Args:
        model: only its configuration files are read.
        config: the run's.
        steps: the sampler's, from `fastnabla.models.sampler.use_sampler`.

    Raises:
        ValueError: the files cannot be read.
    """
    shipped = shipped_scheduler(model)
    ours, name, flow = scheduler_of(shipped, config), type(shipped).__name__, is_flow_matching(shipped)
    schedule = schedule_of(shipped)
    spacing = "the checkpoint" if config.spacing is None else "sampler.spacing"
    table = Table(title="sampler")
    for column in ("what", "value", "from"):
        table.add_column(column)
    for entry, value in schedule.items():
        text = f"{len(value)} values" if isinstance(value, list | tuple) else str(value)
        table.add_row(entry, text, f"the checkpoint's noise schedule ({name})")
    table.add_row("scheduler", type(ours).__name__, f"sampler.scheduler = {config.scheduler}")
    table.add_row("timesteps", _timesteps(steps), f"sampler.steps = {config.steps}")
    if flow:
        table.add_row("times before the shift", f"1 → 1/{len(steps)}, linear", "fastnabla")
    else:
        table.add_row("timestep_spacing", ours.config.timestep_spacing, spacing)
        table.add_row("steps_offset", str(ours.config.steps_offset), spacing if config.spacing is None else "fastnabla")
    for field in ("eta", "min_sigma", "guidance_scale"):
        table.add_row(field, str(getattr(config, field)), f"sampler.{field}")
    table.add_row(
        "memory", f"{steps.memory():.3f}", "correlation of finished samples with the first noise, Gaussian data"
    )
    for entry, value in ({} if flow else FIXED[config.scheduler]).items():
        table.add_row(entry, str(value), "fastnabla")
    for entry, value in unused_settings(shipped, ours, schedule).items():
        table.add_row(entry, f"not {value}", f"fastnabla; {name} is not used to sample")
    return table


def unused_settings(shipped: SchedulerMixin, ours: SchedulerMixin, schedule: dict[str, Any]) -> dict[str, Any]:
    """Settings of the checkpoint's scheduler, besides its noise schedule, that `ours` has otherwise or does not have at all.
    Of the latter, its class's defaults are left out."""
    parameters = inspect.signature(type(shipped).__init__).parameters
    return {
        name: value
        for name, value in shipped.config.items()
        if name in parameters and name not in schedule and value != ours.config.get(name, parameters[name].default)
    }


def _timesteps(steps: TransitionTable) -> str:
    numbers = [*steps.timestep.tolist(), 0]
    shown = numbers if len(numbers) <= 8 else [*numbers[:3], "…", *numbers[-4:]]
    return " → ".join(number if isinstance(number, str) else f"{number:g}" for number in shown)
