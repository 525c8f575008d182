"""What a training step's numbers are of the whole batch, where each rank has computed its share."""

import torch
from torch import Tensor

from fastnabla.distributed.world import World


def whole_rows(world: World, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers by row `[n]` of all ranks, `[N]` in the order of ranks; each column on the device that it was on."""
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, values in rows.items():
        kinds.setdefault((values.dtype, values.device), []).append(name)
    whole: dict[str, Tensor] = {}
    for names in kinds.values():
        columns = world.all_gather(torch.stack([rows[name] for name in names], 1))
        whole |= zip(names, columns.unbind(1), strict=True)
    return {name: whole[name] for name in rows}


def whole_counts(world: World, *counts: dict[str, int]) -> list[dict[str, int]]:
    """Sums over ranks of numbers by name, which are the same names on all."""
    numbers = torch.tensor([number for count in counts for number in count.values()])
    world.sum_([numbers])
    sums = iter(numbers.tolist())
    return [{name: next(sums) for name in count} for count in counts]
