"""Prompts: loading, splitting into training and held-out prompts, and assigning them to trajectories."""

from fastnabla.prompts.length import warn_truncated
from fastnabla.prompts.loading import load_prompts
from fastnabla.prompts.look import look
from fastnabla.prompts.order import assign_prompts, used_prompts
from fastnabla.prompts.sets import PROMPT_SETS
from fastnabla.prompts.split import RunPrompts, prompts_of, split_prompts

__all__ = [
    "PROMPT_SETS",
    "RunPrompts",
    "assign_prompts",
    "load_prompts",
    "look",
    "prompts_of",
    "split_prompts",
    "used_prompts",
    "warn_truncated",
]
