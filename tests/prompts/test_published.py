"""The paper's prompt sets from files of the published shape, with few prompts."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastnabla.prompts import load_prompts
from fastnabla.prompts.published import PUBLISHED_SETS

LISTS = {"photo": 12, "paintings": 11}
DRAWBENCH = [
    ("one", "Colors"),
    ("three, and more", "Text"),
    ('a sign that says "two"', "Colors"),
    ("Rainbow coloured", "Colors"),
    ("a mistke", "Misspellings"),
    ("four", "Text"),
    ("acersecomicke", "Rare Words"),
    ("five", "Text"),
]


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the authors'. The sets have as many prompts as it has."""
    (tmp_path / "HPDv2").mkdir()
    for style, count in LISTS.items():
        prompts = [f"{style} {number}" for number in range(count)]
        prompts[10] += " of\na cat, "
        (tmp_path / "HPDv2" / f"benchmark_{style}.json").write_text(json.dumps(prompts))
    rows = [f'"{prompt.replace(chr(34), 2 * chr(34))}",{category}' for prompt, category in DRAWBENCH]
    (tmp_path / "DrawBench Prompts.csv").write_bytes("\r\n".join(["Prompts,Category", *rows]).encode())
    (tmp_path / "simple_animals.txt").write_text("cat\ndog\n")
    for name, count in zip(PUBLISHED_SETS, (2, 3, 20, 2, 4), strict=True):
        monkeypatch.setitem(PUBLISHED_SETS, name, dataclasses.replace(PUBLISHED_SETS[name], count=count))
    return tmp_path


def test_sets_are_the_authors_(assets: Path) -> None:
    """Of each list of HPDv2 all but the first ten; of each category of DrawBench but two, all but the first two."""

    def load(name: str) -> list[str]:
        return load_prompts(f"{assets}:{name}")

    assert load("simple-animals") == ["cat", "dog"]
    assert load("hpdv2-photo-painting") == ["photo 10 of a cat,", "photo 11", "paintings 10 of a cat,"]
    assert load("hpdv2-photo-painting-test") == [f"{style} {number}" for style in LISTS for number in range(10)]
    assert load("drawbench") == ["Rainbow coloured", "five"]
    assert load("drawbench-test") == ["one", 'a sign that says "two"', "three, and more", "four"]


def test_published_numbers_of_prompts() -> None:
    counts = {name: published.count for name, published in PUBLISHED_SETS.items()}
    assert counts == {
        "simple-animals": 45,
        "hpdv2-photo-painting": 2 * 790,
        "hpdv2-photo-painting-test": 2 * 10,
        "drawbench": 25 + 10 + 19 + 20 + 20 + 10 + 20 + 38 + 21 - 9 * 2,
        "drawbench-test": 9 * 2,
    }


@pytest.mark.parametrize("name", ["hpdv2-photo-painting", "drawbench"])
def test_missing_files_are_named_with_their_origin(assets: Path, name: str) -> None:
    file = assets / PUBLISHED_SETS[name].files[-1]
    file.unlink()
    with pytest.raises(ValueError, match=r"lib/assets of https://github\.com/lzzcd001/nabla-gfn; download") as error:
        load_prompts(f"{assets}:{name}")
    assert str(error.value).startswith(f"prompts.source = '{assets}:{name}': there is no file '{file}'.")
    with pytest.raises(ValueError, match=f"there is no file 'nowhere/.*FOLDER:{name}"):
        load_prompts(f"nowhere:{name}")


@pytest.mark.parametrize("source", ["drawbench", ":drawbench"])
def test_a_published_set_needs_its_folder(source: str) -> None:
    with pytest.raises(ValueError, match=r"write FOLDER:drawbench, with the path of a copy of lib/assets"):
        load_prompts(source)


def test_other_files_are_refused(assets: Path) -> None:
    (assets / "simple_animals.txt").write_text("cat\ndog\nhorse\n")
    with pytest.raises(ValueError, match=r"the set simple-animals has 2 prompts, but simple_animals\.txt give 3; use"):
        load_prompts(f"{assets}:simple-animals")
    (assets / "DrawBench Prompts.csv").write_text("Prompt,Category\na cat,Colors\n")
    with pytest.raises(ValueError, match=r"DrawBench Prompts\.csv': no column or field 'Prompts'"):
        load_prompts(f"{assets}:drawbench")


def test_names_of_sets_can_be_columns_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("drawbench,other\na cat,a dog\n")
    assert load_prompts("table.csv:drawbench") == ["a cat"]
    Path("drawbench").write_text("a cow\n")
    assert load_prompts("drawbench") == ["a cow"]


def test_a_set_has_no_column(assets: Path) -> None:
    with pytest.raises(ValueError, match="a set has no column 'text'"):
        load_prompts(f"{assets}:drawbench", column="text")
