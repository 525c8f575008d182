"""Which process of how many this is, in the environments of the launchers."""

import time

import pytest
import torch

from fastnabla.config.presets import PRESETS
from fastnabla.distributed import world
from fastnabla.distributed.devices import device_of
from fastnabla.distributed.launch import PORTS, RankInfo, launch_notes, require_single_process

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "1234"}
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4711", "SLURM_NODEID": "0"}
SBATCH |= {"SLURM_NPROCS": "4", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[1-2]"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}


def mpi(prefix: str, **changes: str) -> dict[str, str]:
    values = {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"} | changes
    return {f"{prefix}_{name}": value for name, value in values.items()}


OPEN_MPI = mpi("OMPI_COMM_WORLD")


def test_alone_without_a_launcher() -> None:
    assert RankInfo.of({}) == RankInfo() == RankInfo(rank=0, size=1)
    assert RankInfo.of({"SLURM_JOB_ID": "7"}).size == 1
    assert RankInfo.of({"RANK": "0", "WORLD_SIZE": "1"}).size == 1
    assert RankInfo.of({"WORLD_SIZE": "1", "RANK": ""}).size == 1
    assert RankInfo.of({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).size == 1  # accelerate launch --cpu
    assert launch_notes(RankInfo(), {}) == []


def test_torchrun_and_accelerate() -> None:
    expected = RankInfo(rank=5, size=8, local_rank=1, address="node-a", port=1234)
    assert RankInfo.of(TORCHRUN) == expected
    # Started by torchrun, of which srun or mpirun starts one a node.
    assert RankInfo.of(TORCHRUN | SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == expected
    assert RankInfo.of(TORCHRUN | mpi("OMPI_COMM_WORLD", RANK="1", SIZE="2", LOCAL_RANK="0")) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("a-1,b[2-3]", "a-1"),
        ("rack[1-2]n[03,05]", "rack1n03"),
        ("node[5]", "node5"),
    ],
)
def test_srun(nodes: str, first: str) -> None:
    place = RankInfo.of(SRUN | {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": "other"})
    assert place == RankInfo(rank=5, size=8, local_rank=1, address=first, port=PORTS[123456 % len(PORTS)])
    told = RankInfo.of(SRUN | {"SLURM_JOB_NODELIST": nodes, "MASTER_ADDR": "node-b", "MASTER_PORT": "99"})
    assert (told.address, told.port) == ("node-b", 99)


@pytest.mark.parametrize("step", [STEP, {"SLURM_STEP_ID": "0"}, {"SLURM_STEP_NODELIST": "gpu[1-2]"}], ids=",".join)
def test_rank_0_of_srun_waits_for_the_others(step: dict[str, str]) -> None:
    info = RankInfo.of(SBATCH | step)
    assert (info.rank, info.size, info.address) == (0, 4, "gpu1")
    # WORLD_SIZE and MASTER_ADDR are often exported by the batch script.
    assert RankInfo.of(SBATCH | step | {"WORLD_SIZE": "4", "MASTER_ADDR": "gpu1"}) == info


@pytest.mark.parametrize(
    "variables",
    [
        SBATCH,
        SBATCH | {"SLURM_STEP_ID": "4294967291"},  # the batch step's own number
        SBATCH | STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive step, or submitted from one
        {name: value for name, value in SBATCH.items() if name != "SLURM_PROCID"},  # salloc
        OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"},  # as the messages advise
    ],
    ids=["sbatch", "with its step", "interactive step", "salloc", "on purpose"],
)
def test_alone_among_several(variables: dict[str, str]) -> None:
    """In a batch script without srun there is one process, whatever the number of tasks."""
    info = RankInfo.of(variables)
    assert (info.rank, info.size) == (0, 1)
    (note,) = launch_notes(info, variables)
    assert "runs alone, although" in note and ("SLURM_NTASKS = 4" in note or "OMPI_COMM_WORLD_SIZE = 8" in note)


@pytest.mark.parametrize(
    "variables",
    [
        OPEN_MPI,
        mpi("MV2_COMM_WORLD"),
        mpi("MVP_COMM_WORLD"),
        mpi("JSM_NAMESPACE"),
        mpi("PMI"),
        HYDRA | {"MPI_LOCALNRANKS": "8"},
        OPEN_MPI | {"PMIX_RANK": "5"},
    ],
    ids=lambda variables: "+".join(variables),
)
def test_mpirun_on_one_machine(variables: dict[str, str]) -> None:
    expected = RankInfo(rank=5, size=8, local_rank=1)
    assert RankInfo.of(variables) == expected
    # In a batch script, whose variables every process inherits, or on nodes that srun reaches: not 8 times rank 0.
    for slurm in (SBATCH, SBATCH | STEP, SBATCH | {"WORLD_SIZE": "8"}):
        info = RankInfo.of(variables | slurm)
        assert (info.rank, info.size, info.local_rank) == (5, 8, 1)


def test_mpirun_on_several_machines_needs_an_address() -> None:
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set.*mpirun -x MASTER_ADDR"):
        RankInfo.of(several)
    assert RankInfo.of(several | {"MASTER_ADDR": "node-a"}).address == "node-a"
    assert RankInfo.of(several | SBATCH).address == "gpu1"
    without_port = TORCHRUN | {"MASTER_PORT": ""}
    assert RankInfo.of(without_port).port == 29500


def test_srun_with_pmi() -> None:
    """srun --mpi=pmi2 sets rank and size, and --mpi=pmix the rank, without a rank on the machine."""
    for pmi in ({"PMI_RANK": "0", "PMI_SIZE": "4"}, {"PMIX_RANK": "0"}):
        assert RankInfo.of(SBATCH | STEP | pmi) == RankInfo.of(SBATCH | STEP)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK = not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK = 8, WORLD_SIZE = 8.*LOCAL_RANK ≤ RANK < WORLD_SIZE"),
        (TORCHRUN | {"RANK": "one"}, "RANK = 'one'"),
        (TORCHRUN | {"WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE = 0"),
        (TORCHRUN | {"LOCAL_RANK": "6"}, "LOCAL_RANK = 6"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
        (TORCHRUN | {"MASTER_PORT": "auto"}, "MASTER_PORT = 'auto'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT = 70000"),
        ({"WORLD_SIZE": "4"}, "RANK = not set, WORLD_SIZE = 4"),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK = not set"),
        ({"RANK": "0"}, "WORLD_SIZE = not set"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK = 1, WORLD_SIZE = 1"),
        ({"LOCAL_RANK": "3"}, "RANK = not set"),
        ({"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_SIZE = not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK = not set"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "MPI_LOCALRANKID = not set"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK = 3"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "9"}, "OMPI_COMM_WORLD_RANK = 9"),
        ({"SLURM_PROCID": "3"}, "SLURM_NTASKS = not set"),
        (SRUN | {"SLURM_NTASKS": "four"}, "SLURM_NTASKS = 'four'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be(variables: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        RankInfo.of(variables)
    assert any(fix in str(caught.value) for fix in ("WORLD_SIZE=1 RANK=0", "set it to", "must be between"))


@pytest.mark.parametrize("variables", [TORCHRUN, OPEN_MPI, SBATCH | STEP], ids=["torchrun", "mpirun", "srun"])
def test_commands_of_a_single_process_are_not_run_several_times(variables: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="this command runs in one"):
        require_single_process(variables)
    require_single_process(variables | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    require_single_process(SBATCH)


def test_settings_of_accelerate_that_have_no_effect() -> None:
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}
    assert launch_notes(RankInfo(), plain) == []
    (note,) = launch_notes(RankInfo(size=2), plain | {"ACCELERATE_MIXED_PRECISION": "fp16", "WORLD_SIZE": "2"})
    assert "ACCELERATE_MIXED_PRECISION = fp16" in note and "--model.dtype" in note


def test_a_process_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(world, "SILENT", 0.01)
    for info in (RankInfo(rank=0, size=4, address="a", port=7), RankInfo(rank=3, size=4, address="a", port=7)):
        with world._announced_wait(info):
            time.sleep(0.2)
    assert capsys.readouterr().err.splitlines() == [
        "rank 0 of 4 waits for its 3 other processes at a:7, for at most 5 minutes",
        "rank 3 of 4 waits for rank 0 at a:7, for at most 5 minutes",
    ]
    monkeypatch.setattr(world, "SILENT", 60.0)
    with world._announced_wait(info):
        pass
    assert not capsys.readouterr().err


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = PRESETS["testbed"][1]
    assert device_of(config, RankInfo(rank=5, size=8, local_rank=1)) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="local rank = 2: torch sees 2 GPUs"):
        device_of(config, RankInfo(rank=2, size=8, local_rank=2))


def test_a_process_that_sees_one_gpu_alone_computes_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As srun shows them. `torch.cuda.set_device` wants an index."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = PRESETS["testbed"][1]
    assert device_of(config, RankInfo(rank=5, size=8, local_rank=1)) == torch.device("cuda", 0)
    assert device_of(config) == torch.device("cuda")
