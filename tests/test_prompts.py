"""Prompt sources and their assignment to trajectories."""

from pathlib import Path

import pytest

from fastnabla.prompts import assign_prompts, load_prompts


def test_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    assert load_prompts(str(path)) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "no prompts"), (b"\xff\xfe\x00", "UTF-8"), (None, "no such file")]
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(path))
    assert "prompts.source" in str(error.value)


def test_assignment_is_balanced_and_independent_of_the_split() -> None:
    whole = assign_prompts(seed=3, first=0, count=40, num_prompts=10)
    assert all(sorted(part.tolist()) == list(range(10)) for part in whole.split(10))
    parts = [assign_prompts(3, first, 8, 10) for first in range(0, 40, 8)]
    assert whole.tolist() == [n for part in parts for n in part.tolist()]
    assert whole.tolist() != assign_prompts(4, 0, 40, 10).tolist()
