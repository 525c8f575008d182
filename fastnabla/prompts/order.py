"""Which trajectory gets which prompt."""

import torch
from torch import Tensor

from fastnabla.config.sections import PromptDraw
from fastnabla.prompts.split import RunPrompts
from fastnabla.utils.seeding import generator_of


def assign_prompts(seed: int, first: int, count: int, num_prompts: int, draw: PromptDraw = "cycles") -> Tensor:
    """Prompt numbers `[count]`, int64, of the trajectories `first`, `first` + 1, … (counted over the whole run).

    With "cycles", every `num_prompts` consecutive trajectories, from a multiple of it on, see each prompt once, in an
    order of their own; with "independent", any trajectory any prompt. A trajectory's prompt depends on the seed and its number alone: a resumed run goes on with the same prompts,
    and ranks that take parts of a range get what one that takes it all would.
    """
    if draw == "independent":
        generators = [generator_of(seed, "prompts", number) for number in range(first, first + count)]
        return torch.tensor([int(torch.randint(num_prompts, (), generator=g)) for g in generators], dtype=torch.int64)
    cycle, skipped = divmod(first, num_prompts)
    cycles = range(cycle, (first + max(count, 1) - 1) // num_prompts + 1)
    orders = [torch.randperm(num_prompts, generator=generator_of(seed, "prompts", cycle)) for cycle in cycles]
    return torch.cat(orders)[skipped : skipped + count]


def used_prompts(prompts: RunPrompts, seed: int, trajectories: int, draw: PromptDraw = "cycles") -> Tensor:
    """Numbers, in order, of the prompts that a run of so many trajectories trains on or evaluates."""
    if draw == "cycles":
        trajectories = min(trajectories, prompts.trained)  # a cycle has them all
    trained = assign_prompts(seed, 0, trajectories, prompts.trained, draw)
    return torch.cat([trained, torch.tensor(prompts.evaluated)]).unique()
