"""Formats of prompt files: each is read as what it is, or refused with a remedy."""

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastnabla.prompts import load_prompts
from fastnabla.prompts.columns import is_default
from fastnabla.prompts.loading import MAX_PROMPT
from fastnabla.utils.printable import CONTROL

TWO = ["A red ball.", "Two grey mice."]


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # Lines
        ("a.txt", "A red ball.\nTwo grey mice."),
        ("a.PROMPTS", "\n A red ball.\r\nTwo grey mice.\r\n\r\n"),
        ("a", "A red ball.\rTwo grey mice.\r"),
        ("a.txt", "A red ball.\nTwo grey mice.\n".encode("utf-8-sig")),
        ("a.txt", "A red ball.\r\nTwo grey mice.".encode("utf-16")),
        ("a.txt", b"\xfe\xff" + "A red ball.\nTwo grey mice.".encode("utf-16-be")),
        ("a.txt", "A red ball.\nTwo grey mice.".encode("utf-32")),
        # A list
        ("a.json", '["A red ball.", "Two grey mice."]'),
        ("a.txt", '\ufeff[\r\n  "A red ball.",\r\n  "Two grey mice."\r\n]\r\n'),
        ("a.jsonl", '["A red ball.", "Two grey mice."]\n'),
        ("a.csv", '["A red ball.", "Two grey mice."]'),
        ("a.json", '[{"prompt": "A red ball."}, {"n": 1, "prompt": "Two grey mice."}]'),
        ("a.JSON", '[{"Prompts": "A red ball.", "n": 1}, {"Prompts": "Two grey mice."}]'),
        # An object with the prompts in a key
        ("a.json", '{"prompts": ["A red ball.", "Two grey mice."], "version": "the first one"}'),
        ("a.json", '{"Prompt": [{"prompt": "A red ball."}, {"prompt": "Two grey mice."}]}'),
        ("a.json", '{"data": ["A red ball.", "Two grey mice."]}'),
        ("a.json", '{"info": {"year": 2024}, "rows": [{"prompt": "A red ball."}, {"prompt": "Two grey mice."}]}'),
        ("a.json", '{"Prompts": {"0": "A red ball.", "1": "Two grey mice."}, "Category": {"0": "a b", "1": "c d"}}'),
        # An object of objects
        ("a.json", '{"001.png": {"prompt": "A red ball."}, "002.png": {"prompt": "Two grey mice.", "seed": 1}}'),
        ("a.json", '{"0": {"prompt": "A red ball."}, "1": {"prompt": "Two grey mice."}}'),
        ("a.json", '{"0": "A red ball.", "1": "Two grey mice."}'),
        ("a.json", '{"0": ["A red ball."], "1": ["Two grey mice."]}'),
        # An object by prompt
        ("a.json", '{\n  "A red ball.": {\n    "category": "Colors"\n  },\n  "Two grey mice.": {"category": "Rare Words"}\n}'),
        ("a.txt", '{"A red ball.": 3, "Two grey mice.": null}'),
        ("a.json", '{"A red ball.": ["colour"], "Two grey mice.": []}'),
        ("a.json", '{"A red ball.": "Colors", "Two grey mice.": "Counting"}'),
        # JSON Lines
        ("a.jsonl", '{"prompt": "A red ball."}\n{"prompt": "Two grey mice.", "n": [1]}\n'),
        ("a.NDJSON", '\n{"Prompt": "A red ball."}\r\n\r\n{"Prompt": "Two grey mice."}'),
        ("a.json", '{"prompt": "A red ball."}\n{"prompt": "Two grey mice."}'),
        ("a.txt", '{"prompt": "A red ball."}\n{"prompt": "Two grey mice."}'),
        ("a.jsonl", '"A red ball."\n"Two grey mice."'),
        # Tables
        ("a.csv", 'Prompts,Category\nA red ball.,Colors\n"Two grey mice.",Counting\n'),
        ("a.CSV", '\ufeff"Category", "prompt"\r\n"a ""b"", c", "A red ball."\r\n\r\n1, Two grey mice.\r\n,\r\n'),
        ("a.csv", "Category;Prompt\nColors;A red ball.\nCounting;Two grey mice."),
        ("a.csv", "Category\tPrompt\nColors\tA red ball.\nCounting\tTwo grey mice."),
        ("a.csv", "Category|Prompt\nColors|A red ball.\nCounting|Two grey mice."),
        ("a.csv", "prompt\nA red ball.\nTwo grey mice.,\n"),
        ("a.csv", 'note,prompt\n"two\nlines",A red ball.\n,Two grey mice.\n'),
        ("a.tsv", "Prompt\tCategory\tNote\nA red ball.\tColors\t\nTwo grey mice.\tAnimals, \"grey\" ones\t\n"),
        ("a.tsv", 'Prompt\tNote\n"A red ball."\tx\nTwo grey mice.\t"""y"""\n'),
    ],
)  # fmt: skip
def test_formats(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert load_prompts(written(tmp_path, name, content)) == TWO


def test_lines_with_commas_and_brackets_are_lines(tmp_path: Path) -> None:
    lines = [
        "[oil] a red ball, on grass.",
        "{{detailed}} mice, two of them",
        '"OPEN", a neon sign',
        '{"',
        "[1",
        "- a",
        "#art",
    ]
    assert load_prompts(written(tmp_path, "a.txt", "\n".join(lines))) == lines


def test_quotes_of_tables(tmp_path: Path) -> None:
    """Programs that write TSV as CSV quote cells with quotes; PartiPrompts has quotes as they are."""
    plain = 'Prompt\tCategory\n"G I" in thick letters\tWriting\na sign "OPEN"\tWriting\n"STOP"\tWriting'
    assert load_prompts(written(tmp_path, "a.tsv", plain)) == ['"G I" in thick letters', 'a sign "OPEN"', '"STOP"']
    commas = 'Prompt,Category\na sign "OPEN",Writing\n"a sign ""STOP"", red",Writing'
    assert load_prompts(written(tmp_path, "a.csv", commas)) == ['a sign "OPEN"', 'a sign "STOP", red']


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.csv", "id,caption\n1,A red ball.\n2,Two grey mice.", "caption"),
        ("a.csv", "Prompt,prompt\nx,A red ball.\ny,Two grey mice.", "prompt"),
        ("a.txt", "id\tcaption\n1\tA red ball.\n2\tTwo grey mice.", "caption"),
        ("a.txt", "Prompts,Category\nA red ball.,x\nTwo grey mice.,y", "Prompts"),
        ("a.jsonl", '{"text": "A red ball."}\n{"text": "Two grey mice."}', "text"),
        ("a.jsonl", '{"a": {"b": {"c": "A red ball."}}}\n{"a.b.c": "Two grey mice."}', "a.b.c"),
        ("a.json", '[{"caption": "A red ball."}, {"caption": "Two grey mice."}]', "caption"),
        ("a.json", '{"train": ["A red ball.", "Two grey mice."], "test": ["A cat."]}', "train"),
        ("a.json", '{"train": {"data": [{"t": "A red ball."}, {"t": "Two grey mice."}]}, "test": 1}', "train.data.t"),
        ("a.json", '{"Colors": ["A red ball."], "Counting": ["Two grey mice."]}', "*"),
        ("a.json", '{"Colors": [{"t": "A red ball."}], "Counting": [{"t": "Two grey mice."}]}', "*.t"),
        ("a.json", '{"images": [{"id": 1}], "annotations": [{"caption": "A red ball."}, {"caption": "Two grey mice."}]}', "caption"),
        ("a.json", '{"0": {"t": "A red ball."}, "1": {"t": "Two grey mice."}}', "t"),
        ("a.json", '{"text": "A red ball.", "more": "Two grey mice."}', "*"),
    ],
)  # fmt: skip
def test_column(tmp_path: Path, name: str, content: str, column: str) -> None:
    source = written(tmp_path, name, content)
    assert load_prompts(source, column=column) == load_prompts(f"{source}:{column}") == TWO
    assert load_prompts(f"{source}:{column}", column="another") == TWO


def test_names_may_contain_colons(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, "a:b.csv", "c:d,prompt\nA cat.,A dog.") + ":c:d") == ["A cat."]
    assert load_prompts(written(tmp_path, "a.csv", "b:d,prompt\nA cat.,A dog.") + ":b:d") == ["A cat."]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", "Prompts,Category\nA red ball.,x", None, "looks like the header of a table.*prompts.column"),
        ("a.txt", '"id";"Prompt"\n1;A red ball.', None, "looks like the header of a table"),
        ("a.txt", "caption\tn\nA red ball.\t1", None, "looks like the header of a table"),
        ("a.txt", "Prompts:\nA red ball.", None, "looks like the header of a table"),
        ("a.txt", "id,caption\n1,A red ball.", None, "looks like the header of a table"),
        ("a.txt", "text\nA red ball.", None, "looks like the header of a table"),
        ("a.txt", "# Mine\nA red ball.", None, "'# Mine', looks like a comment; remove comments"),
        ("a.jsonc", '// Mine\n["A red ball."]', None, "looks like a comment"),
        ("a.yaml", "- A red ball.\n- Two grey mice.", None, "begins like an item of a list; remove the dashes"),
        ("a.txt", "1. A red ball.\n\n2. Two grey mice.", None, "begins like an item of a list"),
        ("a.txt", '"A red ball."\n"Two grey mice."', None, "is in quotes, .* remove them, or write a JSON list"),
        ("a.txt", "'A red ball.',\n'Two grey mice.'", None, "is in quotes"),
        ("a.txt", "\n<!DOCTYPE html>\n<html>", None, "is HTML or XML; download the file itself"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\nsize 3", None, "pointer of Git LFS .* git lfs pull"),
        ("a.txt", b"\x1f\x8b\x08\x00", None, "is a gzip file; unpack it"),
        ("a.csv", b"PK\x03\x04\x14\x00", None, "is a ZIP or Excel file"),
        ("a.parquet", b"PAR1\x15\x00", None, "is a Parquet file"),
        ("a.txt", '["A red ball.",', None, "begins like JSON, but is not valid .*line 1 column 16.*as a JSON list"),
        ("a.txt", "{\n  A red ball.\n}", None, "begins like JSON, but is not valid"),
        ("a.txt", "['A red ball.', 'Two grey mice.']", None, "begins like JSON, but is not valid"),
        ("a.txt", "A red ball.\n", "Prompts", "no column or field 'Prompts'; use one of 'A red ball.'.*leave prompts.column out"),
        ("a.json", "A red ball.\n", None, "not valid JSON .*rename a file with one prompt per line to .txt"),
        ("a.json", '["A red ball.",\n"b"\n"c"]', None, "not valid JSON .*line 3"),
        ("a.jsonl", '[\n"A red ball.",\n"b"\n"c"\n]', None, "not valid JSON .*line 4"),
        ("a.json", '{"prompt": "a"}{"prompt": "b"}', None, "not valid JSON .Extra data"),
        ("a.json", '{"A cat.": 1, "A cat.": 2}', None, "A cat.: appears twice"),
        ("a.json", "[" * 100_000, None, "not valid JSON .*(nested too deeply|recursion)"),
        # Where Python's recursion limit was raised, the value itself is reached.
        ("a.json", '{"prompt":' * 900 + "1" + "}" * 900, None, "nested too deeply|must be text, not int"),
        ("a.json", "{}", None, "has no prompts"),
        ("a.json", "", None, "has no prompts"),
        ("a.json", '["A red ball."]', "text", "has no fields, and so no 'text'; leave prompts.column out"),
        ("a.json", '[{"text": "a", "label": 1}]', None, "called prompt or prompts; choose one of 'text', 'label' with prompts.column"),
        ("a.json", '[{"text": "a", "label": 1}]', "txt", "no column or field 'txt'; use one of 'text', 'label'"),
        ("a.jsonl", '{"text": "A red ball."}', None, "choose one of 'text' with prompts.column"),
        ("a.json", '[{"prompt": "a", "Prompts": 1}]', None, "several columns of prompts; choose one of 'prompt', 'Prompts'"),
        ("a.json", '{"train": ["A red ball."], "test": ["A cat."]}', None, "Choose a key with prompts.column, or . for all: 'train', 'test'"),
        ("a.json", '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', None, "several lists .*: 'train', 'test', '[*]'"),
        ("a.json", '{"train": [{"t": "a"}], "test": [{"t": "b"}]}', "t", "several lists .*: 'train.t', 'test.t', '[*].t'"),
        ("a.json", '{"train": ["A red ball."]}', "val", "no key or field 'val'; use one of 'train'"),
        ("a.json", '{"info": {}, "annotations": [{"id": 1, "caption": "A red ball."}]}', None, "with prompts.column, .* 'info', 'annotations.id', 'annotations.caption'"),
        ("a.json", '{"001.png": {"caption": "A red ball."}}', None, "keys or the values may be the prompts"),
        ("a.json", '{"A red ball.": "A ball that is red."}', None, "keys or the values may be the prompts"),
        ("a.json", '{"Simple colours": ["A red ball."], "Rare words": ["Two mice."]}', None, "keys or the values may be"),
        ("a.json", '{"colours": {"A red ball.": {"n": 1}}, "counts": {"Two grey mice.": {"n": 2}}}', None, "keys or the values may be"),
        ("a.json", '{"Simple colours": {"A red ball.": 1}, "Rare words": {"Two grey mice.": 2}}', None, "keys or the values may be"),
        ("a.json", '{"train": {"data": ["A red ball."]}, "test": {"data": []}}', None, "keys or the values may be"),
        ("a.json", '{"model": {"lr": 1}, "data": {"seed": 2}}', None, "keys or the values may be"),
        ("a.json", '{"name": "mine", "count": 2}', None, "keys or the values may be the prompts"),
        ("a.csv", "text,label\nA cat.,1", None, "called prompt or prompts; choose one of 'text', 'label' with prompts.column"),
        ("a.csv", "A red ball, round.\nA cat.", None, "The first line of a table must name its columns; if every line is a prompt, rename"),
        ("a.csv", "Prompt,prompts\na,b", None, "several columns of prompts; choose one of 'Prompt', 'prompts'"),
        ("a.csv", "prompt,n,prompt\na,1,b", None, "has 2 columns called 'prompt'; rename all but the one"),
        ("a.csv", "prompt\n", None, "has no prompts"),
    ],
)  # fmt: skip
def test_ambiguous_files_are_refused_with_a_remedy(
    tmp_path: Path, name: str, content: str | bytes, column: str | None, message: str
) -> None:
    source = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(source, column=column)
    assert str(error.value).startswith(f"prompts.source = {source!r}: ")


def test_sets_and_unnamed_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a set has no column 'text'; .*FILE:COLUMN"):
        load_prompts("animals", column="text")
    with pytest.raises(ValueError, match="is a folder; give a file in it"):
        load_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="write a column after the colon"):
        load_prompts(written(tmp_path, "a.csv", "prompt\na") + ":")


BAD_FILES = {
    "a.txt": (
        "A red ball.\n\x07\nb\ufeffc\n\nTwo grey mice.\n" + "x" * (MAX_PROMPT + 1) + "\nd\te\n\u202ef\n\x1b\n\x00",
        ["line 2", "line 3", "line 6", "line 7", "line 8"],
    ),
    "a.jsonl": (
        '{"prompt": "A red ball."}\n{"prompt": "\\u0007"}\n{"prompt": 5}\n\n{"prompt": "Two grey mice."}\n'
        '{"text": "a"}\n{"prompt"\n[1]\n{"prompt": ""}\n"a"',
        ["line 2", "line 3", "line 6", "line 7", "line 8"],
    ),
    "a.csv": (
        'prompt,n\nA red ball.,1\n\x07,2\nb, c, 3\n\nTwo grey mice.,4\n,5\n"d" e,6\n"f\ng",7\nh\n\ufeffi,8',
        ["line 3", "line 4", "line 7", "line 8", "lines 9 to 10"],
    ),
    "a.json": (
        '["A red ball.", "\\u0007", 5, "Two grey mice.", null, "", ["a"], "\\ud800", "a\\nb"]',
        ["entry 2", "entry 3", "entry 5", "entry 6", "entry 7"],
    ),
}
"""Files of two good prompts and seven bad ones, with the places of the first five."""


@pytest.mark.parametrize("name", BAD_FILES)
def test_all_bad_lines_are_told_at_once(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    content, places = BAD_FILES[name]
    source = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=r"bad lines, 7 of 9:") as error:
        load_prompts(source)
    _, *named, more, remedy = str(error.value).split("\n")
    assert [line.split(":")[0].strip() for line in named] == places
    assert more == "  and 2 more" and "--prompts.bad-lines skip" in remedy

    assert load_prompts(source, bad_lines="skip") == TWO
    assert [(r.name, r.levelno) for r in caplog.records] == [("fastnabla", logging.WARNING)]
    assert caplog.messages[0].startswith(
        f"prompts.source = {source!r}: skipped bad lines, 7 of 9; the first: {places[0]}"
    )


def test_a_file_of_bad_lines_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad lines, 2 of 2:") as error:
        load_prompts(written(tmp_path, "a.txt", "\x07\n\x1b"), bad_lines="skip")
    assert "skip" not in str(error.value)


def test_an_open_quote_names_the_lines_that_it_spans(tmp_path: Path) -> None:
    content = 'prompt,n\n"a,1\nb,2\n"c",3\nd,4\n"e,5\nf,6'
    with pytest.raises(ValueError, match=r"lines 2 to 4: not CSV .*\n  lines 6 to 7: not CSV"):
        load_prompts(written(tmp_path, "a.csv", content))


def table(separator: str, end: str) -> Callable[[list[str]], bytes]:
    def write(prompts: list[str]) -> bytes:
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=separator, lineterminator=end)
        writer.writerows([("Category", "Prompts"), *(("a, b", prompt) for prompt in prompts)])
        return file.getvalue().encode()

    return write


def as_json(value: Callable[[list[str]], object], **options: object) -> Callable[[list[str]], bytes]:
    return lambda prompts: json.dumps(value(prompts), **options).encode()


def json_lines(row: Callable[[str], object]) -> Callable[[list[str]], bytes]:
    return lambda prompts: "\n".join(json.dumps(row(prompt)) for prompt in prompts).encode()


WRITERS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "lines": ("a.txt", lambda prompts: "\n".join(prompts).encode()),
    "lines, Windows": ("a.txt", lambda prompts: "\r\n".join(prompts).encode("utf-8-sig")),
    "lines, Mac OS 9": ("a.txt", lambda prompts: "\r".join(prompts).encode()),
    "lines, UTF-16": ("a.txt", lambda prompts: "\n".join(prompts).encode("utf-16")),
    "list": ("a.json", as_json(list, indent=2)),
    "list in one line": ("a.jsonl", as_json(list, ensure_ascii=False)),
    "list of objects": ("a.json", as_json(lambda prompts: [{"n": 1, "prompt": prompt} for prompt in prompts])),
    "object with a list": ("a.json", as_json(lambda prompts: {"prompts": prompts})),
    "object by prompt": ("a.json", as_json(lambda prompts: {prompt: {"category": "Colors"} for prompt in prompts})),
    "JSON Lines": ("a.JSONL", json_lines(lambda prompt: {"Prompt": prompt})),
    "JSON Lines by content": ("a.txt", json_lines(lambda prompt: {"prompt": prompt})),
    "JSON Lines of texts": ("a.jsonl", json_lines(str)),
    "CSV": ("a.csv", table(",", "\r\n")),
    "CSV with semicolons": ("a.csv", table(";", "\n")),
    "TSV": ("a.tsv", table("\t", "\n")),
}
TEXTS = (st.text(st.sampled_from("ab .,;\"'{}[]:\\") | st.characters(codec="utf-8"), max_size=12)).map(str.strip)
PROMPTS = st.lists(
    TEXTS.filter(lambda text: text and not CONTROL.search(text) and not is_default(text) and not text.isdecimal()),
    min_size=1,
    max_size=6,
    unique=True,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
@given(prompts=PROMPTS)
def test_prompts_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, name: str, prompts: list[str]
) -> None:
    suffix, write = WRITERS[name]
    if name.startswith("lines"):  # not like JSON, and not like a header
        prompts = ["a cat", *(prompt for prompt in prompts if prompt != "a cat")]
    source = written(tmp_path_factory.getbasetemp(), suffix, write(prompts))
    assert load_prompts(source) == prompts
