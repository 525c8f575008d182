"""Which process of how many this is, by what torchrun, accelerate or srun put into the environment."""

import dataclasses
import os
import re
from collections.abc import Mapping

PORTS = range(10_000, 30_000)
"""Where a SLURM job's processes meet, by the job's number, if MASTER_PORT does not say; below Linux's ephemeral ports."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """A process among those of a run."""

    rank: int = 0
    """Its number, from 0."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number among those on its machine."""
    address: str = "localhost"
    """Of rank 0's machine."""
    port: int = 29500
    """Where they meet."""

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "RankInfo":
        """By RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun and accelerate set them; else by
        SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID, as srun does, and the first of its nodes where MASTER_ADDR is not
        set; else alone.

        Raises:
            ValueError: a variable is missing, or is no such number.
        """
        names = next((names for names in NAMES if {*names[:2]} <= environment.keys()), None)
        if names is None:
            return cls()
        rank, size, local_rank = (_number(environment, name) for name in names)
        if size == 1 and rank == 0:
            return cls(local_rank=local_rank or 0)
        if None in (rank, size, local_rank) or not local_rank <= rank < size:
            raise ValueError(
                f"{names[0]} = {rank}, {names[1]} = {size}, {names[2]} = {local_rank}: need 0 ≤ {names[2]} ≤ {names[0]} < "
                f"{names[1]}; start with torchrun, accelerate launch or srun, which set them."
            )
        address = environment.get("MASTER_ADDR") or _first_node(environment)
        if not address:
            raise ValueError("MASTER_ADDR is not set: give the address of rank 0's machine, or start with torchrun.")
        job, port = _number(environment, "SLURM_JOB_ID"), _number(environment, "MASTER_PORT")
        if port is None:
            port = cls.port if job is None else PORTS[job % len(PORTS)]
        return cls(rank=rank, size=size, local_rank=local_rank, address=address, port=port)


NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
"""Of rank, size and local rank, by launcher; the first whose first two are set count."""


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} = {text!r}: must be a whole number.")
    return int(text)


def _first_node(environment: Mapping[str, str]) -> str | None:
    """Of SLURM's list of nodes, such as ``gpu[007-009,012],login1``: gpu007."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environment.get(name):
            return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", environment[name])[0])
    return None
