"""This process's rank and the world size, from the environment variables of torchrun, accelerate, mpirun or srun."""

import dataclasses
import os
import re
from collections.abc import Mapping

Environment = Mapping[str, str]

PORTS = range(10_000, 30_000)
"""Ports for the rendezvous of SLURM jobs without MASTER_PORT, chosen by job id; below Linux's ephemeral ports."""
START = "Start all processes with torchrun, accelerate launch, mpirun or srun; for a single process, set WORLD_SIZE=1 RANK=0."


@dataclasses.dataclass(frozen=True, slots=True)
class Launcher:
    """A command that starts several processes, and the variables that it sets in each of them."""

    command: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None = None
    """Number of processes on this machine."""

    @property
    def names(self) -> tuple[str, str, str]:
        """The variables that define a rank."""
        return self.rank, self.size, self.local_rank

    def has_set(self, environment: Environment) -> bool:
        """Whether all that is needed is set: the rank and the size, and with several processes the local rank."""
        rank, size, local_rank = map(environment.get, self.names)
        return bool(rank and size and (local_rank or size == "1"))


MPI = (
    ("mpirun of Open MPI", "OMPI_COMM_WORLD"),
    ("mpirun of MVAPICH2", "MV2_COMM_WORLD"),
    ("mpirun of MVAPICH", "MVP_COMM_WORLD"),
    ("jsrun", "JSM_NAMESPACE"),
)
"""Launchers whose variables differ in a prefix."""
LAUNCHERS = (
    Launcher("torchrun or accelerate launch", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *(Launcher(command, f"{p}_RANK", f"{p}_SIZE", f"{p}_LOCAL_RANK", f"{p}_LOCAL_SIZE") for command, p in MPI),
    Launcher("mpirun of MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("mpiexec of Cray", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
"""All but srun. The first one whose variables are set is used: mpirun may itself be started by srun."""
SRUN = Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "the dtype is --model.dtype",
    "ACCELERATE_DYNAMO_BACKEND": "networks are compiled with --compute.compile",
    "ACCELERATE_USE_FSDP": "full finetuning (--lora.rank 0) is sharded on several processes without it",
    "ACCELERATE_USE_DEEPSPEED": "full finetuning (--lora.rank 0) is sharded on several processes without it",
}
"""Settings of `accelerate launch` that have no effect, and what to use instead."""


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
    def of(cls, environment: Environment = os.environ) -> "RankInfo":
        """Read the environment.

        The first of `LAUNCHERS`, and then srun, that has set its variables is used. MASTER_ADDR and MASTER_PORT are those of
        torchrun. Without MASTER_ADDR, the ranks meet on this machine if all of them are here, and else on the first node of a
        SLURM job. Without any launcher's variables the process is alone. So it is in a SLURM batch script without srun.

        Raises:
            ValueError: a variable is missing, is not a whole number, or is out of range.
        """
        launchers = [*LAUNCHERS, *_srun(environment)]
        begun = [launcher for launcher in launchers if any(environment.get(name) for name in launcher.names)]
        if not begun:
            if environment.get("PMIX_RANK"):
                raise ValueError(
                    f"PMIX_RANK = {environment['PMIX_RANK']}, but no variable has the number of processes. {START}"
                )
            return cls()
        launcher = next((launcher for launcher in begun if launcher.has_set(environment)), begun[0])
        rank, size, local_rank = (_number(environment, name) for name in launcher.names)
        if size == 1 and not rank:
            return cls(local_rank=local_rank or 0)
        values = ", ".join(f"{name} = {environment.get(name) or 'not set'}" for name in launcher.names)
        if rank is None or size is None or local_rank is None:
            raise ValueError(f"{values}: {launcher.command} sets all three. {START}")
        if not local_rank <= rank < size:
            order = f"0 ≤ {launcher.local_rank} ≤ {launcher.rank} < {launcher.size}"
            raise ValueError(f"{values}: must satisfy {order}. {START}")
        address, port = _address(environment, launcher, size), _port(environment)
        return cls(rank=rank, size=size, local_rank=local_rank, address=address, port=port)


def require_single_process(environment: Environment = os.environ) -> None:
    """Check that a command that runs in one process was not started in several.

    Raises:
        ValueError: it was; or see `RankInfo.of`.
    """
    size = RankInfo.of(environment).size
    if size > 1:
        raise ValueError(
            f"{size} processes were started, but this command runs in one: start it without torchrun, accelerate launch, "
            "mpirun and srun. If the processes are independent of each other, set WORLD_SIZE=1 RANK=0 in each."
        )


def launch_notes(info: RankInfo, environment: Environment = os.environ) -> list[str]:
    """What the user of a launcher may not expect: a process that runs alone, settings that have no effect.

    Args:
        info: this process, as `RankInfo.of` read it.
        environment: the variables.
    """
    notes = []
    sizes = [launcher.size for launcher in LAUNCHERS] + ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]
    others = [name for name in sizes if (environment.get(name) or "1") != "1"]
    if info.size == 1 and others:
        notes.append(
            f"This process runs alone, although {others[0]} = {environment[others[0]]}. To run on several processes, start "
            "them with srun, mpirun or torchrun."
        )
    notes += [
        f"{name} = {environment[name]}, from accelerate launch, has no effect: {instead}."
        for name, instead in ACCELERATE.items()
        if environment.get(name, "no").lower() not in ("", "no", "false", "0")
    ]
    return notes


def _srun(environment: Environment) -> list[Launcher]:
    """`SRUN`, if srun started this process.

    In a batch script SLURM sets rank 0 and the number of tasks too, but only the script's own process exists. What srun starts
    has variables of its step. The steps of batch scripts and interactive shells have numbers above 2³¹.
    """
    is_step = any(environment.get(name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"))
    is_step |= re.fullmatch("[0-9]{1,9}", environment.get("SLURM_STEP_ID", "")) is not None
    is_step |= environment.get("SLURM_PROCID", "0") != "0"
    if not is_step:
        return []
    size = SRUN.size if environment.get(SRUN.size) else "SLURM_NTASKS"
    return [dataclasses.replace(SRUN, size=size)]


def _number(environment: Environment, name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} = {text!r}: must be a whole number. {START}")
    return int(text)


def _port(environment: Environment) -> int:
    job, port = _number(environment, "SLURM_JOB_ID"), _number(environment, "MASTER_PORT")
    if port is None:
        return RankInfo().port if job is None else PORTS[job % len(PORTS)]
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT = {port}: must be between 1 and 65535, and free on rank 0's machine.")
    return port


def _address(environment: Environment, launcher: Launcher, size: int) -> str:
    """Address of rank 0's machine.

    Raises:
        ValueError: it is unknown.
    """
    local_size = _number(environment, launcher.local_size) if launcher.local_size else None
    here = RankInfo().address if local_size == size else None
    address = environment.get("MASTER_ADDR") or here or _first_node(environment)
    if not address:
        raise ValueError(
            "MASTER_ADDR is not set: set it to the address of rank 0's machine (mpirun -x MASTER_ADDR=HOST with Open MPI, "
            "mpirun -genv MASTER_ADDR HOST with MPICH and Intel MPI), or use torchrun."
        )
    return address


def _first_node(environment: Environment) -> str | None:
    """The first of SLURM's nodes: gpu007 for ``gpu[007-009,012],login1``."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environment.get(name):
            return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", environment[name])[0])
    return None
