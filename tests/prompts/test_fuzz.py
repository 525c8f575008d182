"""Any input gives clean prompts or a ValueError."""

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastnabla.prompts import load_prompts, split_prompts
from fastnabla.prompts.loading import MAX_PROMPT

RIGHT_TO_LEFT = "אבגدهو\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROL = "\0\a\b\t\n\v\f\r\x1b\x1c\x7f\x85\u2028\u2029\ufeff\ud800"
ODD = st.text(st.sampled_from(RIGHT_TO_LEFT + CONTROL + "{}a \u200d\xa0é猫👩") | st.characters(), max_size=30)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b""])
HUGE = st.sampled_from([MAX_PROMPT - 1, MAX_PROMPT, MAX_PROMPT + 1, 1 << 20]).map(lambda n: b"x" * n)
LINES = st.binary(max_size=40) | ODD.map(lambda text: text.encode("utf-8", "surrogatepass")) | HUGE
FILES = st.lists(st.tuples(LINES, LINE_ENDS), max_size=6).map(lambda parts: b"".join(a + b for a, b in parts))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("prompt") | ODD, inner, max_size=3),
    max_leaves=6,
)


def prompts_or_error(source: str, templates: tuple[str, ...] = ()) -> list[str] | None:
    """The checked prompts. None for an error, which must name field and value."""
    try:
        prompts = load_prompts(source, templates)
    except ValueError as error:
        assert str(error).startswith((f"prompts.source = {source!r}: ", "prompts.template = "))
        return None
    assert prompts and len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert prompt and prompt == prompt.strip() and len(prompt) <= MAX_PROMPT
        assert not {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(c) for c in prompt}
        assert not {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"} & set(
            map(unicodedata.bidirectional, prompt)
        )
    return prompts


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], str]:
    folder = tmp_path_factory.mktemp("fuzz")

    def write(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


@pytest.mark.slow
@given(content=FILES)
@example(content=b"\xef\xbb\xbf")
@example(content=b"\xef\xbb\xbf\xef\xbb\xbfa")
def test_text_files(write: Callable[[str, bytes], str], content: bytes):
    prompts = prompts_or_error(write("prompts.txt", content))
    if prompts is not None:
        lines = {line.strip() for line in re.split("\r\n|\r|\n", content.decode("utf-8-sig"))}
        assert set(prompts) == lines - {""}


@pytest.mark.slow
@example(content=b'["a", "b", "a"]')
@given(content=FILES | st.lists(JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
def test_json_lines(write: Callable[[str, bytes], str], content: bytes):
    prompts = prompts_or_error(write("prompts.jsonl", content))
    if prompts is not None:
        rows = [json.loads(line) for line in re.split("\r\n|\r|\n", content.decode("utf-8-sig")) if line.strip()]
        if isinstance(rows[0], list):  # the file is one JSON value, whatever its name
            (rows,) = rows
        texts = (row if isinstance(row, str) else row["prompt"] for row in rows)
        assert prompts == list(dict.fromkeys(text.strip() for text in texts))


@pytest.mark.slow
@given(name=st.sampled_from(["a.txt", "a.json", "a.csv", "a.tsv", "a.txt:prompt"]), value=JSON, content=FILES)
@example(name="a.json", value=[["prompt"]], content=b'{"prompt":' * 900 + b"1" + b"}" * 900)
@example(name="a.csv", value=None, content=b'prompt\n"' + b"x" * 200_000)
def test_any_file(write: Callable[[str, bytes], str], name: str, value: Any, content: bytes):
    name, _, column = name.partition(":")
    for data in (json.dumps(value, indent=1).encode(), content):
        source = write(name, data)
        for chosen in (None, "*", column or None):
            prompts_or_error(f"{source}:{chosen}" if chosen else source)


@given(values=st.lists(ODD | JSON, max_size=5))
def test_hub_columns(values: list):
    class Table(dict):
        column_names = ("prompt",)

    stub = SimpleNamespace(load_dataset=lambda name, split: Table(prompt=values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", stub)
        prompts = prompts_or_error("hf:someone/prompts:prompt")
    assert prompts is None or set(prompts) == {value.strip() for value in values}


@pytest.mark.slow
@given(
    source=ODD | st.lists(st.sampled_from(["hf:", ":", "a", "/", ".jsonl", "animals", "\0"]), max_size=6).map("".join)
)
def test_sources(source: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        prompts = prompts_or_error(source)
    assert prompts is None or source == "animals"


@given(templates=st.lists(ODD | st.tuples(ODD, ODD).map("{}".join), min_size=1, max_size=3))
def test_templates(templates: list[str]):
    prompts = prompts_or_error("animals", tuple(templates))
    assert (prompts is None) or all(template.count("{}") == 1 for template in templates)


@pytest.mark.slow
@given(prompts=st.lists(ODD.filter(lambda t: "\ud800" not in t), max_size=20), share=st.floats(), seed=st.integers(0))
def test_splits(prompts: list[str], share: float, seed: int):
    try:
        parts = split_prompts(prompts, share, seed)
    except ValueError:
        return
    assert all(parts) and sorted(parts[0] + parts[1]) == sorted(prompts)
