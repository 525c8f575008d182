"""Records in 8 bytes a number read as those that were appended, in little memory."""

import tracemalloc

import pytest

from fastnabla.run.record_list import RecordList

RECORDS = [
    {"phase": "evaluate", "update": 0, "reward": 1.5},
    {"phase": "train", "update": 1, "loss": 0.1, "skipped": 0},
    {"phase": "train", "update": 2, "loss": None, "skipped": 1},
    {"phase": "evaluate", "update": 2, "reward": None, "floor": 2**53},
]


def test_reads_as_the_list_of_them() -> None:
    records = RecordList(RECORDS)
    assert records == RECORDS == list(records) == records[:] and list(reversed(records)) == RECORDS[::-1]
    assert [list(record) for record in records] == [list(record) for record in RECORDS]  # the order of names, too
    assert records[-1] == RECORDS[-1] and records[1:3] == RECORDS[1:3] and len(records) == 4
    assert isinstance(records[1]["skipped"], int) and isinstance(records[0]["reward"], float)
    assert records.of("train") == RECORDS[1:3] and records.of("start") == []
    with pytest.raises(IndexError):
        records[4]


def test_takes_little_more_than_8_bytes_a_number() -> None:
    records = RecordList()
    tracemalloc.start()
    for update in range(2000):
        records.append({"phase": "train", "update": update} | {f"metric_{i}": update / (i + 1) for i in range(30)})
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 1.5 * 8 * 2000 * 33
