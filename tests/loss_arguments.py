"""What a user of `residual_db_loss` holds: a batch that mixes inner and last transitions."""

from typing import Any

import torch
from torch import Tensor

from fastnabla.transition import TransitionTable
from tests.checks import ddim_table, randn

SHAPE = (4, 2, 3, 5)
STEPS = torch.tensor([9, 0, 5, 9])  # the first and the last row are last transitions of 10


def random(seed: int, dtype: torch.dtype = torch.float64, copies: int = 1) -> Tensor:
    return randn(copies * SHAPE[0], *SHAPE[1:], seed=seed, dtype=dtype)


def arguments(
    guidance: float | None, dtype: torch.dtype = torch.float64, table: TransitionTable | None = None
) -> dict[str, Any]:
    """What a user holds, without flow, trust region and reverse term; the sampler is DDIM's unless another `table` is given."""
    copies, table = 1 if guidance is None else 2, table or ddim_table()
    x = random(0, dtype)
    rows = table.rows(STEPS, x)
    return {
        "noise_pred": random(1, dtype, copies).requires_grad_(),
        "noise_pred_ref": random(2, dtype, copies),
        "x_t": x,
        "x_next": rows.a * x + rows.b * random(3, dtype) + rows.sigma * random(4, dtype),
        "timesteps": rows.timestep,
        "scheduler": table,
        "reward_score_next": random(5, dtype),
    }


def reverse_arguments(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    names = ("score_reverse", "score_ref_reverse", "reward_score", "flow_score")
    values = {name: random(10 + seed, dtype) for seed, name in enumerate(names)}
    values["flow_score"].requires_grad_()
    return values
