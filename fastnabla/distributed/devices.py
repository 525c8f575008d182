"""The device that a rank computes on."""

import torch

from fastnabla.config.train import TrainConfig
from fastnabla.distributed.launch import RankInfo
from fastnabla.distributed.world import ALONE


def device_of(config: TrainConfig, info: RankInfo = ALONE.rank_info) -> torch.device:
    """The device of the rank `info` in the run `config`. Each of several ranks has a GPU of its own, with its index: the only one
    that it sees, as under ``srun --gpus-per-task=1``, or that of its local rank.

    Raises:
        ValueError: `config.device` is "cuda" and torch sees no GPU, or it sees several, but fewer than processes.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no GPU on this machine; use --device cpu.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    kind = found if config.device == "auto" else config.device
    if kind != "cuda" or info.size == 1:
        return torch.device(kind)
    gpus = torch.cuda.device_count()
    index = info.local_rank if gpus > 1 else 0
    if index >= gpus:
        raise ValueError(
            f"local rank = {info.local_rank}: torch sees {gpus} GPUs on this machine; start at most {gpus} processes on it."
        )
    return torch.device(kind, index)
