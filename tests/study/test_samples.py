"""Files of measured samples."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastnabla.metrics.measures import Measures
from fastnabla.study.samples import Samples, has_samples, read_samples, write_samples

KEY = {"seed": 1, "samples": 2}


def samples(features: bool = True) -> Samples:
    prompt = torch.arange(3).repeat_interleave(2)
    numbers = torch.arange(6, dtype=torch.float64)
    measures = Measures(
        prompt=prompt,
        reward=numbers,
        total=numbers + 1,
        parts={"area": numbers + 2, "classifier": numbers + 3},
        hue=numbers / 6,
        dark=numbers % 2,
        features=numbers[:, None] * torch.ones(6, 4, dtype=torch.float64) if features else None,
        pixels=numbers[:, None] * torch.ones(6, 5, dtype=torch.float64),
    )
    return Samples(measures=measures, correct=numbers % 2 if features else None)


@pytest.mark.parametrize("features", [True, False])
def test_samples_are_read_as_they_were_written(tmp_path: Path, features: bool):
    written = samples(features)
    write_samples(tmp_path / "new" / "file.safetensors", written, KEY)
    read = read_samples(tmp_path / "new" / "file.safetensors", KEY)
    for field in dataclasses.fields(Measures):
        a, b = (getattr(each.measures, field.name) for each in (written, read))
        assert (a is None) == (b is None)
        if isinstance(a, dict):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        elif a is not None:
            assert torch.equal(a, b) and a.dtype == b.dtype
    assert torch.equal(read.correct, written.correct) if features else read.correct is None


def test_the_first_samples_are_those_of_each_prompt():
    first = samples().first(1)
    assert first.measures.prompt.tolist() == [0, 1, 2]
    assert first.measures.reward.tolist() == [0, 2, 4]
    assert first.per_prompt == 1


def test_samples_of_another_key_do_not_count(tmp_path: Path):
    path = tmp_path / "file.safetensors"
    assert not has_samples(path, KEY) and read_samples(path, KEY) is None
    write_samples(path, samples(), KEY)
    assert has_samples(path, KEY)
    assert not has_samples(path, KEY | {"samples": 3}) and read_samples(path, KEY | {"samples": 3}) is None


def test_a_damaged_file_is_named(tmp_path: Path):
    path = tmp_path / "file.safetensors"
    write_samples(path, samples(), KEY)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"file\.safetensors.*remove it to measure again"):
        read_samples(path, KEY)
