"""Where a run computes."""

import torch

from fastnabla.config.train import TrainConfig
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import ALONE


def device_of(config: TrainConfig, info: RankInfo = ALONE.rank_info) -> torch.device:
    """Where the run `config` computes, in the process at `place`: its own of the GPUs that it sees.

    Raises:
        ValueError: it names a GPU, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no GPU here; use --device cpu.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    kind = found if config.device == "auto" else config.device
    if kind == "cuda" and torch.cuda.device_count() > 1 and info.size > 1:
        return torch.device(kind, info.local_rank)
    return torch.device(kind)
