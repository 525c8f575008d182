"""The documentation: its links lead somewhere, its command lines parse, the files and test files that it names exist, and
the messages that it quotes are the package's.
"""

import ast
import functools
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


MESSAGES = ROOT / "docs" / "troubleshooting.md"
VARIES = "…"


def quoted_messages() -> list[str]:
    """Lines of the page's blocks of text."""
    blocks = re.findall(r"```text\n(.*?)```", MESSAGES.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@functools.cache
def package_strings() -> str:
    """All strings of the package, one a line, with `VARIES` in place of what is filled in."""
    found = []
    for path in (ROOT / "fastnabla").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = [node.values for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        parts += [[node] for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for values in parts:
            text = "".join(part.value if isinstance(part, ast.Constant) else VARIES for part in values)
            found.append(re.sub(r"%[-+ #0-9.]*[sdrgf]", VARIES, text).replace("\n", " "))
    return "\n".join(found)


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_the_package_s(message: str) -> None:
    """What varies in the message may be anything in the package's string."""
    fixed = [part.strip() for part in message.split(VARIES)]
    assert max(map(len, fixed)) >= 12, "too short to find"
    assert re.search(".*".join(map(re.escape, fixed)), package_strings()), message


def test_a_message_that_is_no_longer_printed_is_found() -> None:
    with pytest.raises(AssertionError):
        test_quoted_messages_are_the_package_s("out of memory with … rows in a micro-batch; giving up after …")
