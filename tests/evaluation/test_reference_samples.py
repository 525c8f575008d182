"""The file of reference samples: drawn once, extended, shared between runs, and safe from interruptions."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnabla.evaluation import reference_samples
from fastnabla.evaluation.reference_samples import reference_latents, weight_files

KEY = {"model": {"name": "a"}, "prompts": ["x", "y"]}


def draw(samples: range) -> Tensor:
    """Latents of two prompts, whose values encode prompt and number."""
    number = torch.tensor(samples, dtype=torch.float32)
    return torch.stack([number, number + 1000])[:, :, None, None, None].expand(2, -1, 1, 2, 2)


def never(samples: range) -> Tensor:
    pytest.fail(f"drew {samples}")


@pytest.fixture(autouse=True)
def blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_samples, "BLOCK", 4)


def test_are_drawn_once_and_extended(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    assert torch.equal(reference_latents(path, [], KEY, 6, draw), draw(range(6)))
    assert torch.equal(reference_latents(path, [], KEY, 6, never), draw(range(6)))
    assert torch.equal(reference_latents(path, [], KEY, 5, never), draw(range(5)))
    drawn = []
    more = reference_latents(path, [], KEY, 12, lambda samples: drawn.append(samples) or draw(samples))
    assert torch.equal(more, draw(range(12))) and drawn == [range(6, 10), range(10, 12)]


def test_an_interruption_loses_a_block_at_most(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"

    def interrupted(samples: range) -> Tensor:
        if samples.start == 8:
            raise KeyboardInterrupt
        return draw(samples)

    with pytest.raises(KeyboardInterrupt):
        reference_latents(path, [], KEY, 12, interrupted)
    assert torch.equal(reference_latents(path, [], KEY, 8, never), draw(range(8)))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_longest_file_is_taken_and_others_are_only_read(tmp_path: Path) -> None:
    own, short, long = (tmp_path / name for name in ("own", "short", "long"))
    reference_latents(short, [], KEY, 2, draw)
    reference_latents(long, [], KEY, 6, draw)
    before = long.read_bytes()
    assert torch.equal(reference_latents(own, [short, long], KEY, 6, never), draw(range(6)))
    assert not own.exists()
    assert torch.equal(reference_latents(own, [short, long], KEY, 7, draw), draw(range(7)))
    assert own.exists() and long.read_bytes() == before


def test_files_of_another_key_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    reference_latents(path, [], KEY, 6, lambda samples: draw(samples) + 0.5)
    assert torch.equal(reference_latents(path, [], {**KEY, "seed": 1}, 3, draw), draw(range(3)))


def test_a_damaged_file_of_another_run_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, other, damaged = (tmp_path / name for name in ("own", "other", "damaged"))
    damaged.write_bytes(b"cut off")
    reference_latents(other, [], KEY, 5, draw)
    with caplog.at_level("WARNING", "fastnabla"):
        assert torch.equal(reference_latents(own, [damaged, other], KEY, 5, never), draw(range(5)))
    assert "damaged' cannot be read" in caplog.text


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    path.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"reference\.safetensors.*remove it"):
        reference_latents(path, [], KEY, 3, draw)


def test_a_file_of_another_run_that_may_not_be_read_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    reference_latents(theirs, [], KEY, 5, draw)
    opened = reference_samples.safe_open

    def forbidden(path: Path, framework: str) -> object:
        if path == theirs:
            raise FileNotFoundError("No such file or directory")  # what safetensors says of a file of mode 0600
        return opened(path, framework)

    monkeypatch.setattr(reference_samples, "safe_open", forbidden)
    with caplog.at_level("WARNING", "fastnabla"):
        assert torch.equal(reference_latents(own, [theirs], KEY, 3, draw), draw(range(3)))
    assert "theirs' cannot be read" in caplog.text


def test_processes_that_draw_at_the_same_time_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one writes the file between the first one's writing and renaming."""
    path, process, save, seconds = tmp_path / "reference.safetensors", [1], reference_samples.save_file, []
    monkeypatch.setattr(os, "getpid", lambda: process[0])

    def interrupted(tensors: dict[str, Tensor], partial: Path, metadata: dict[str, str]) -> None:
        save(tensors, partial, metadata=metadata)
        if process == [1]:
            process[0] = 2
            seconds.append(reference_latents(path, [], KEY, 3, draw))

    monkeypatch.setattr(reference_samples, "save_file", interrupted)
    assert torch.equal(reference_latents(path, [], KEY, 4, draw), draw(range(4)))
    assert torch.equal(seconds[0], draw(range(3)))
    assert torch.equal(reference_latents(path, [], KEY, 4, never), draw(range(4)))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_model_s_folder_is_known_by_its_weights(tmp_path: Path) -> None:
    assert weight_files("some/model") == {}
    weights = tmp_path / "unet" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    before = weight_files(str(tmp_path))
    assert before.keys() == {"unet/model.safetensors"} and weight_files(str(tmp_path)) == before
    weights.write_bytes(b"another")
    assert weight_files(str(tmp_path)) != before
    assert weight_files(str(weights)).keys() == {"."}
