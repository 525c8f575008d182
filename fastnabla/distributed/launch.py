"""This process's rank and the world size, from the environment variables of torchrun, accelerate or srun."""

import dataclasses
import os
import re
from collections.abc import Mapping

PORTS = range(10_000, 30_000)
"""Ports for the rendezvous of SLURM jobs without MASTER_PORT, chosen by job id; below Linux's ephemeral ports."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """A process of a run."""

    rank: int = 0
    """From 0."""
    size: int = 1
    """Number of ranks."""
    local_rank: int = 0
    """Rank among the processes on this machine."""
    address: str = "localhost"
    """Address of rank 0's machine."""
    port: int = 29500
    """Port of the rendezvous."""

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "RankInfo":
        """Read the environment.

        torchrun and accelerate set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun sets SLURM_PROCID,
        SLURM_NTASKS and SLURM_LOCALID; there, MASTER_ADDR defaults to the job's first node. Without either set of variables
        the process is alone.

        Raises:
            ValueError: a variable is missing, is not a whole number, or is out of range.
        """
        names = next((names for names in NAMES if {*names[:2]} <= environment.keys()), None)
        if names is None:
            return cls()
        rank, size, local_rank = (_number(environment, name) for name in names)
        if size == 1 and rank == 0:
            return cls(local_rank=local_rank or 0)
        if None in (rank, size, local_rank) or not local_rank <= rank < size:
            raise ValueError(
                f"{names[0]} = {rank}, {names[1]} = {size}, {names[2]} = {local_rank}: must satisfy 0 ≤ {names[2]} ≤ "
                f"{names[0]} < {names[1]}. Start with torchrun, accelerate launch or srun, which set all three."
            )
        address = environment.get("MASTER_ADDR") or _first_node(environment)
        if not address:
            raise ValueError("MASTER_ADDR is not set: set it to the address of rank 0's machine, or use torchrun.")
        job, port = _number(environment, "SLURM_JOB_ID"), _number(environment, "MASTER_PORT")
        if port is None:
            port = cls.port if job is None else PORTS[job % len(PORTS)]
        return cls(rank=rank, size=size, local_rank=local_rank, address=address, port=port)


NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
"""Variables of rank, size and local rank, by launcher. The first launcher with both rank and size set is used."""


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} = {text!r}: must be a whole number.")
    return int(text)


def _first_node(environment: Mapping[str, str]) -> str | None:
    """The first of SLURM's nodes: gpu007 for ``gpu[007-009,012],login1``."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environment.get(name):
            return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", environment[name])[0])
    return None
