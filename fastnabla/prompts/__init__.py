"""Prompts: where they come from, and which trajectory gets which."""

from pathlib import Path

import torch
from torch import Tensor

from fastnabla.seeding import generator_of
from fastnabla.testbed.silhouettes import ANIMALS, PHRASINGS, caption

PROMPT_SETS = {
    "animals": tuple(caption(animal) for animal in ANIMALS),
    "animals-phrased": tuple(caption(animal, i) for animal in ANIMALS for i in range(len(PHRASINGS))),
}


def load_prompts(source: str) -> list[str]:
    """The prompts of a named set, or of a UTF-8 text file with one a line (blank lines are skipped).

    Raises:
        ValueError: neither a set nor a readable text file, or a file without prompts.
    """
    if source in PROMPT_SETS:
        return list(PROMPT_SETS[source])
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"prompts.source = {source!r}: no such file, nor one of the sets {', '.join(PROMPT_SETS)}. "
            "Give a UTF-8 text file with one prompt a line."
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"prompts.source = {source!r}: cannot be read as UTF-8 text ({error}).") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts.source = {source!r}: the file has no prompts; write one a line.")
    return prompts


def assign_prompts(seed: int, first: int, count: int, num_prompts: int) -> Tensor:
    """Prompt numbers `[count]` of the trajectories `first`, `first` + 1, … (counted over the whole run).

    Every `num_prompts` consecutive trajectories see each prompt once, in an order of their own.
    """
    trajectories = torch.arange(first, first + count)
    cycles = {
        cycle: torch.randperm(num_prompts, generator=generator_of(seed, "prompts", cycle))
        for cycle in (trajectories // num_prompts).unique().tolist()
    }
    return torch.stack([cycles[n // num_prompts][n % num_prompts] for n in trajectories.tolist()])
