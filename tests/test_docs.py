"""The documentation: its links lead somewhere, its command lines parse, and the files and test files that it names exist."""

import re
import subprocess
from pathlib import Path

import pytest
import tyro

from fastnabla.compare import CompareConfig
from fastnabla.evaluate import EvaluateConfig
from fastnabla.export import ExportConfig
from fastnabla.sample import SampleConfig
from fastnabla.train import parse

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "bench", "csrc", "kernels", "fastnabla/objective", "tests/golden")
PAGES = sorted({*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))})
PAGES.remove(ROOT / "CHANGELOG.md")  # it names what is gone
CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)
COMMAND = re.compile(r"-m fastnabla\.(train|sample|evaluate|export|compare)\b([^`\n#]*)")
PYTHON_FILES = {"setup.py"} | {
    path.name for folder in ("fastnabla", "kernels", "bench", "tests", "docs") for path in (ROOT / folder).rglob("*.py")
}
THEIRS = {"hpsv2.py", "imagereward.py", "convert_diffusers_to_original_sdxl.py"}
"""Files of the reference implementation and of diffusers."""
PARSERS = {"sample": SampleConfig, "evaluate": EvaluateConfig, "export": ExportConfig, "compare": CompareConfig}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, command and arguments of the command lines, with … left out."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for command, arguments in COMMAND.findall(text):
            line = arguments.replace("…", "").replace("$RUN", "RUN")
            words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
            found.append((name(page), command, words.stdout.split("\n")[:-1] if line.strip() else []))
    return [(page, command, words) for page, command, words in found if words and "PRESET" not in words]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("page", "command", "words"), commands())
def test_command_lines_parse(page: str, command: str, words: list[str]) -> None:
    parse(words) if command == "train" else tyro.cli(PARSERS[command], args=words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_python_files_exist(page: Path) -> None:
    """A path in a code span starts at the root, the package or the page's folder; a name alone is a file anywhere."""
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for path in re.findall(r"`([\w/]+\.py)`", text):
        places = (ROOT / path, ROOT / "fastnabla" / path, page.parent / path)
        known = any(place.exists() for place in places) if "/" in path else path in PYTHON_FILES
        if not known:
            missing.append(path)
    assert set(missing) <= THEIRS
