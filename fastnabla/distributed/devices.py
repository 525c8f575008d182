"""The device that a rank computes on."""

import torch

from fastnabla.config.train import TrainConfig
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import ALONE


def device_of(config: TrainConfig, info: RankInfo = ALONE.rank_info) -> torch.device:
    """The device of the rank `info` in the run `config`. With several visible GPUs, each local rank has its own.

    Raises:
        ValueError: `config.device` is "cuda" and torch sees no GPU, or there are fewer GPUs than processes.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no GPU on this machine; use --device cpu.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    kind = found if config.device == "auto" else config.device
    if kind == "cuda" and torch.cuda.device_count() > 1 and info.size > 1:
        gpus = torch.cuda.device_count()
        if info.local_rank >= gpus:
            raise ValueError(
                f"local rank = {info.local_rank}: torch sees {gpus} GPUs on this machine; start at most {gpus} processes on it."
            )
        return torch.device(kind, info.local_rank)
    return torch.device(kind)
