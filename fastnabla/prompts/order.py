"""Assigning prompts to trajectories."""

import torch
from torch import Tensor

from fastnabla.config.model_sections import PromptDraw
from fastnabla.prompts.split import RunPrompts
from fastnabla.utils.seeding import generator_of


def assign_prompts(seed: int, first: int, count: int, num_prompts: int, draw: PromptDraw = "cycles") -> Tensor:
    """Prompt numbers `[count]`, int64, of the trajectories `first`, `first` + 1, …, counted over the whole run.

    With "cycles", each block of `num_prompts` trajectories sees every prompt once, in a random order. With "independent",
    each trajectory draws its prompt independently. A trajectory's prompt depends only on the seed and its number. So a
    resumed run continues with the same prompts, and several ranks get the same prompts as a single one.
    """
    if draw == "independent":
        generators = [generator_of(seed, "prompts", number) for number in range(first, first + count)]
        return torch.tensor([int(torch.randint(num_prompts, (), generator=g)) for g in generators], dtype=torch.int64)
    cycle, skipped = divmod(first, num_prompts)
    cycles = range(cycle, (first + max(count, 1) - 1) // num_prompts + 1)
    orders = [torch.randperm(num_prompts, generator=generator_of(seed, "prompts", cycle)) for cycle in cycles]
    return torch.cat(orders)[skipped : skipped + count]


def used_prompts(prompts: RunPrompts, seed: int, trajectories: int, draw: PromptDraw = "cycles") -> Tensor:
    """Sorted numbers of the prompts that a run of `trajectories` trajectories trains on or evaluates."""
    if draw == "cycles":
        trajectories = min(trajectories, prompts.trained)  # one cycle contains all prompts
    trained = assign_prompts(seed, 0, trajectories, prompts.trained, draw)
    return torch.cat([trained, torch.tensor(prompts.evaluated)]).unique()
