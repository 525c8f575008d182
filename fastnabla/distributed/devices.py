"""The device that a rank computes on."""

import torch

from fastnabla.config.train import TrainConfig
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import ALONE


def device_of(config: TrainConfig, info: RankInfo = ALONE.rank_info) -> torch.device:
    """The device of the rank `info` in the run `config`. With several visible GPUs, each local rank has its own.

    Raises:
        ValueError: `config.device` is "cuda" and torch sees no GPU.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no GPU on this machine; use --device cpu.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    kind = found if config.device == "auto" else config.device
    if kind == "cuda" and torch.cuda.device_count() > 1 and info.size > 1:
        return torch.device(kind, info.local_rank)
    return torch.device(kind)
