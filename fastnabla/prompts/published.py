"""The prompt sets of the paper (arXiv 2412.07775), read from the files that its authors publish.

The sets are those of the authors' lib/reward_func/prompts.py, which trains on a part of each list and leaves the rest for tests.
"""

import dataclasses
import os

from fastnabla.prompts.entries import Entries
from fastnabla.prompts.files import read_file

ORIGIN = "lib/assets of https://github.com/lzzcd001/nabla-gfn"
UNUSED = ("Misspellings", "Rare Words")
"""Categories of DrawBench that the authors leave out."""


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedSet:
    """A set of prompts in the authors' files."""

    count: int
    """Number of prompts."""
    files: tuple[str, ...]
    """Paths in the folder."""
    part: slice
    """The prompts of each file that are in the set; of each category, if `by_category`."""
    by_category: bool = False
    """Whether the files are tables with the columns Prompts and Category, as DrawBench's."""


_HPDV2 = ("HPDv2/benchmark_photo.json", "HPDv2/benchmark_paintings.json")
_DRAWBENCH = ("DrawBench Prompts.csv",)

PUBLISHED_SETS = {
    "simple-animals": PublishedSet(45, ("simple_animals.txt",), slice(None)),
    "hpdv2-photo-painting": PublishedSet(2 * 790, _HPDV2, slice(10, None)),
    "hpdv2-photo-painting-test": PublishedSet(2 * 10, _HPDV2, slice(10)),
    "drawbench": PublishedSet(165, _DRAWBENCH, slice(2, None), by_category=True),
    "drawbench-test": PublishedSet(9 * 2, _DRAWBENCH, slice(2), by_category=True),
}
"""Name → set."""


def read_published(folder: str, name: str) -> Entries:
    """Read one of the `PUBLISHED_SETS` from a folder of the authors' files.

    White space within a prompt becomes single spaces, which CLIP's tokenizer does too: a prompt of HPDv2 has a line break.

    Raises:
        ValueError: a file is missing or is not the published one.
        OSError: a file cannot be read.
    """
    chosen = PUBLISHED_SETS[name]
    prompts = []
    for file in chosen.files:
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            raise ValueError(
                f"there is no file {path!r}. It is in {ORIGIN}; download that folder, and write FOLDER:{name} with its path."
            )
        try:
            groups = _categories(path) if chosen.by_category else [list(read_file(path, None))]
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        prompts += [
            (f"{file}, {place}", " ".join(value.split()) if isinstance(value, str) else value)
            for group in groups
            for place, value in group[chosen.part]
        ]
    if len(prompts) != chosen.count:
        raise ValueError(
            f"the set {name} has {chosen.count} prompts, but {', '.join(chosen.files)} give {len(prompts)}; use the files of "
            f"{ORIGIN}."
        )
    return prompts


def _categories(path: str) -> list[list]:
    """The entries of each used category."""
    groups: dict[str, list] = {}
    for entry, (_, category) in zip(read_file(path, "Prompts"), read_file(path, "Category"), strict=True):
        if category not in UNUSED:
            groups.setdefault(category, []).append(entry)
    return list(groups.values())
