"""Which process of how many this is, in the environments of the launchers."""

import pytest

from fastnabla.distributed.launch import PORTS, RankInfo

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "1234"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}


def test_alone_without_a_launcher() -> None:
    assert RankInfo.of({}) == RankInfo() == RankInfo(rank=0, size=1)
    assert RankInfo.of({"SLURM_JOB_ID": "7"}).size == 1
    assert RankInfo.of({"RANK": "0", "WORLD_SIZE": "1"}).size == 1


def test_torchrun_and_accelerate() -> None:
    expected = RankInfo(rank=5, size=8, local_rank=1, address="node-a", port=1234)
    assert RankInfo.of(TORCHRUN) == expected
    # Started by torchrun, of which srun starts one a node.
    assert RankInfo.of(TORCHRUN | SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == expected


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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"LOCAL_RANK": ""}, "LOCAL_RANK = None"),
        ({"RANK": "8"}, "RANK = 8, WORLD_SIZE = 8"),
        ({"RANK": "one"}, "RANK = 'one'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2'"),
        ({"LOCAL_RANK": "6"}, "LOCAL_RANK = 6"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
    ],
)
def test_what_cannot_be(changes: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RankInfo.of(TORCHRUN | changes)
