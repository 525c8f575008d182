"""What the processes of a run tell each other, in two and three of them."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from fastnabla.distributed import world as distributed
from fastnabla.distributed.beacon import BEACON
from fastnabla.distributed.rendezvous import rendezvous
from fastnabla.distributed.world import ALONE, World
from tests.ranks import on_ranks


def collectives(world: World) -> dict:
    distributed.BUCKET = 100  # so that what follows takes several
    tensors = [torch.arange(12.0).view(3, 4) + world.rank, torch.ones(40), torch.tensor([2, 3]), torch.tensor(1.5)]
    tensors.append((torch.arange(60.0) * (world.rank + 1)).view(1, 3, 4, 5).to(memory_format=torch.channels_last))
    world.sum_(tensors)
    mine = world.rank_rows(7)
    rows = torch.stack([mine.float(), -mine.float()], 1)
    scattered = torch.arange(world.rank, 5, world.size)
    return {
        "sums": tensors,
        "strides": tensors[-1].stride(),
        "share": mine,
        "concatenated": world.all_gather(rows),
        "assembled": world.all_gather_rows(torch.full((len(scattered),), float("nan")), scattered, 5),
        "flags": world.all_gather_rows(scattered == 2, scattered, 5),
        "none of one rank": world.all_gather(torch.full((3 * world.rank, 2), world.rank)),
        "numbers": [world.sum(world.rank + 1), world.max(10 - world.rank)],
        "told": world.broadcast(lambda: {"who": world.rank, "text": "∇", "nan": float("nan")}),
        "bytes": list(world.broadcast_bytes(lambda: bytes([world.rank, 7]))),
        "local": world.local_size,
        "entered": BEACON.collectives,
    }


@pytest.mark.parametrize("size", [1, 3])
def test_collectives(size: int, tmp_path: Path) -> None:
    results = on_ranks(tmp_path, size, collectives) if size > 1 else [collectives(ALONE)]
    shares = [result.pop("share") for result in results]
    assert torch.cat(shares).tolist() == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    entered = {result.pop("entered") for result in results}
    assert len(entered) == 1 and (entered == {0}) == (size == 1)
    for result in results:
        matrix, ones, whole, scalar, image = result["sums"]
        ranks = sum(range(size))
        assert torch.equal(matrix, size * torch.arange(12.0).view(3, 4) + ranks)
        assert torch.equal(ones, torch.full((40,), float(size)))
        assert whole.tolist() == [2 * size, 3 * size] and scalar.item() == 1.5 * size
        assert torch.equal(image, (torch.arange(60.0) * (ranks + size)).view(1, 3, 4, 5))
        assert result["strides"] == (60, 1, 15, 3)
        assert torch.equal(result["concatenated"], torch.stack([torch.arange(7.0), -torch.arange(7.0)], 1))
        assert result["assembled"].isnan().all() and result["flags"].tolist() == [i == 2 for i in range(5)]
        expected = [rank for rank in range(size) for _ in range(3 * rank)]
        assert result["none of one rank"].tolist() == [[rank, rank] for rank in expected]
        assert result["numbers"] == [sum(range(1, size + 1)), 10]
        told = result["told"]
        assert (told["who"], told["text"]) == (0, "∇") and told["nan"] != told["nan"]
        assert result["bytes"] == [0, 7] and result["local"] == size


def test_those_restarted_meet_each_other_and_not_those_before() -> None:
    store, names = HashStore(), []
    for _ in range(3):  # attempts

        def come(rank: int) -> None:
            names.append(rendezvous(store, rank, 3, timedelta(seconds=20)))

        threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 2, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(names) == 9
    attempts = [set(names[i : i + 3]) for i in (0, 3, 6)]
    assert [len(attempt) for attempt in attempts] == [1, 1, 1] and len(set.union(*attempts)) == 3


def test_who_has_not_come_is_named() -> None:
    store = HashStore()
    store.set("announced/1", "an earlier attempt's")
    with pytest.raises(RuntimeError, match=r"missing ranks: \[1, 2\]"):
        rendezvous(store, 0, 3, timedelta(seconds=0.1))
