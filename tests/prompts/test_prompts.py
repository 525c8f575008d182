"""Prompt sources and templates."""

import json
import logging
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastnabla.prompts import PROMPT_SETS, files, load_prompts
from fastnabla.prompts.loading import MAX_PROMPT


def write(folder: Path, content: bytes, name: str = "prompts.txt") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def test_sets_hold_distinct_prompts_with_the_right_article():
    animals = load_prompts("animals")
    assert len(animals) == 10 and {"a bear", "an elephant", "a zebra"} < set(animals)
    assert load_prompts("animals-phrased")[:4] == [
        "a bear",
        "a picture of a bear",
        "the silhouette of a bear",
        "a bird",
    ]
    simple = load_prompts("simple-animals")
    assert len(simple) == 45
    assert {"a photo of a cat", "a photo of an elephant", "a photo of an owl"} < set(simple)
    assert all(len(set(prompts)) == len(prompts) for prompts in PROMPT_SETS.values())


@pytest.mark.parametrize(
    "content",
    [
        b"a cat\n\n  a dog  \n",
        b"a cat\r\n\r\na dog\r\n",
        b"a cat\r\ra dog\r",
        b"\xef\xbb\xbfa cat\na dog",
        b"\n\xc2\xa0\na cat\t\n\n\na dog\n\n",
    ],
    ids=["unix", "windows", "mac os 9", "byte order mark", "blanks"],
)
def test_text_file_has_a_prompt_a_line(tmp_path: Path, content: bytes):
    assert load_prompts(write(tmp_path, content)) == ["a cat", "a dog"]


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shell does not expand the tilde of `--prompts.source=~/prompts.txt`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, b"a cat\n")
    assert load_prompts("~/prompts.txt") == ["a cat"]


def test_other_scripts_are_kept(tmp_path: Path):
    prompts = ["חתול", "قطة صغيرة", "一只猫", "un chat à l’été", "👩‍🔬 and a cat"]
    assert load_prompts(write(tmp_path, "\n".join(prompts).encode())) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "no prompts"),
        (b"", "no prompts"),
        (b"\xef\xbb\xbf", "no prompts"),
        (b"\xff\xfe\x00", "begins like UTF-16, but is not .*save the file as UTF-8"),
        (b"\xff\xfe\x00\xd8a\x00", "begins like UTF-16, but is not"),
        (b"a cat\n\na d\xf6g\n", "line 3: not UTF-8 text .byte 0xF6"),
        ("a cat\n".encode("utf-16-le"), "looks like UTF-16 without a byte order mark; save the file as UTF-8"),
        (b"a cat\na\x1b[31m dog\n", "line 2: contains the control character U\\+001B"),
        (b"a cat\na\tdog\n", "line 2: contains the control character U\\+0009"),
        ("a cat\na \x85dog\n".encode(), "line 2: contains the control character U\\+0085"),
        ("a \u202egod a\n".encode(), "line 1: contains the control character U\\+202E"),
        ("a \u2067dog\u2069\n".encode(), "line 1: contains the control character U\\+2067"),
        (b"a cat\n\xef\xbb\xbfa dog\n", "line 2: contains the control character U\\+FEFF"),
        (b"a cat\n" + b"x" * (MAX_PROMPT + 1), f"line 2: has {MAX_PROMPT + 1} characters; shorten it to at most {MAX_PROMPT}"),
        (None, "no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_text_files_are_refused(tmp_path: Path, content: bytes | None, message: str):
    source = str(tmp_path / "prompts.txt")
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(source)
    assert str(error.value).startswith(f"prompts.source = {source!r}: ")


@pytest.mark.parametrize("source", ["", "no such set", "a\0b", "x" * 100_000, "hf", "nothing.jsonl:prompt", "\ud800"])
def test_sources_that_do_not_exist_are_refused(source: str):
    with pytest.raises(ValueError, match="no such file, and not one of the sets simple-animals, "):
        load_prompts(source)


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str, mode: str):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"prompts\.source = .*Permission denied"):
        load_prompts(write(tmp_path, b"a cat"))


def test_longest_prompt_is_taken(tmp_path: Path):
    assert load_prompts(write(tmp_path, b"x" * MAX_PROMPT)) == ["x" * MAX_PROMPT]


def test_json_lines(tmp_path: Path):
    rows = [
        {"prompt": "a cat", "text": "one"},
        {"prompt": "ein Hündchen ", "text": "two"},
        {"prompt": "a cat", "text": "two "},
    ]
    source = write(tmp_path, "\n\n".join(map(json.dumps, rows)).encode("utf-8-sig"), "prompts.jsonl")
    assert load_prompts(source) == load_prompts(source + ":prompt") == ["a cat", "ein Hündchen"]
    assert load_prompts(source + ":text") == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a dog", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("1" * 10_000, "not JSON"),
        ('["a dog"]', "must be an object with the field 'prompt', not list"),
        ('"a dog"', "must be an object with the field 'prompt', not str"),
        ('{"text": "a dog"}', "no field 'prompt' among 'text'"),
        ('{"prompt": "a dog", "prompt": "a cow"}', "prompt: appears twice"),
        ('{"prompt": " "}', "is empty"),
        ('{"prompt": null}', "must be text, not NoneType"),
        ('{"prompt": ["a dog"]}', "must be text, not list"),
        ('{"prompt": "a\\ndog"}', r"control character U\+000A"),
        ('{"prompt": "\\ud800 dog"}', r"control character U\+D800"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_json_lines_are_refused(tmp_path: Path, line: str, message: str):
    source = write(tmp_path, b'{"prompt": "a cat"}\n\n' + line.encode(), "prompts.jsonl")
    with pytest.raises(ValueError, match="line 3: .*" + message) as error:
        load_prompts(source)
    assert str(error.value).startswith(f"prompts.source = {source!r}: ")


class HubTable:
    """The part of `datasets.Dataset` that fastnabla uses."""

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, column: str) -> list:
        return self.columns[column]

    def flatten(self) -> "HubTable":
        flat = {}
        for name, values in self.columns.items():
            fields = values[0] if isinstance(values[0], dict) else ()
            flat |= {f"{name}.{field}": [value[field] for value in values] for field in fields} or {name: values}
        return HubTable(flat)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A stub of datasets with one data set. Returns the list of requests."""
    asked = []

    def load_dataset(name: str, split: str) -> HubTable:
        asked.append((name, split))
        if name != "someone/prompts":
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")
        return HubTable(
            {
                "Prompt": ["a cat", "a dog", "a cat"],
                "score": [1, 2, 3],
                "notes": ["fine", "a\x07bell", ""],
                "info": [{"text": "one"}, {"text": "two"}, {"text": "three"}],
            }
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_column(hub: list[tuple[str, str]]):
    assert load_prompts("hf:someone/prompts:Prompt") == ["a cat", "a dog"]
    assert load_prompts("hf:someone/prompts:Prompt:test[:50%]") == ["a cat", "a dog"]
    assert hub == [("someone/prompts", "train"), ("someone/prompts", "test[:50%]")]


def test_hub_column_by_default_or_by_prompts_column(hub: list[tuple[str, str]]):
    assert load_prompts("hf:someone/prompts") == load_prompts("hf:someone/prompts::test") == ["a cat", "a dog"]
    assert hub == [("someone/prompts", "train"), ("someone/prompts", "test")]
    assert load_prompts("hf:someone/prompts", column="info.text") == ["one", "two", "three"]
    assert load_prompts("hf:someone/prompts::test", column="info.text") == ["one", "two", "three"]
    assert load_prompts("hf:someone/prompts:Prompt", column="info.text") == ["a cat", "a dog"]
    assert load_prompts("hf:someone/prompts:notes", bad_lines="skip") == ["fine"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "write hf:OWNER/NAME:COLUMN"),
        ("hf::Prompt", "write hf:OWNER/NAME:COLUMN"),
        (
            "hf:someone/prompts:prompt",
            "no column or field 'prompt'; use one of 'Prompt', 'score', 'notes', 'info.text'",
        ),
        ("hf:someone/prompts:score", "row 0: a prompt must be text, not int"),
        (
            "hf:someone/prompts:notes",
            r"bad lines, 2 of 3:\n  row 1: .* character U\+0007; remove it\.\n  row 2: is empty",
        ),
        ("hf:someone/else:Prompt", "the split 'train' of 'someone/else' cannot be loaded .*doesn't exist"),
    ],
)
def test_bad_hub_columns_are_refused(hub: list[tuple[str, str]], source: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(source)
    assert str(error.value).startswith(f"prompts.source = {source!r}: ")


def test_hub_without_the_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"prompts\.source = .*run: pip install datasets"):
        load_prompts("hf:someone/prompts:Prompt")


def test_templates_multiply(tmp_path: Path):
    source = write(tmp_path, b"cat\n{dog}\n")
    assert load_prompts(source, ("a photo of a {}", "{}, {oil}")) == [
        "a photo of a cat",
        "cat, {oil}",
        "a photo of a {dog}",
        "{dog}, {oil}",
    ]


@pytest.mark.parametrize(
    "template", ["", "a photo", "{} and {}", "a {animal}", "a {0}", "{}\x00", "{}" + "x" * MAX_PROMPT]
)
def test_bad_templates_are_refused(template: str):
    with pytest.raises(ValueError, match=r"prompts\.template = ") as error:
        load_prompts("animals", ("{}", template))
    assert repr(template) in str(error.value)


def test_repeated_prompts_are_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = write(tmp_path, b"a cat\na dog\n a cat\na cat \na cow\na dog")
    assert load_prompts(source) == ["a cat", "a dog", "a cow"]
    assert [(r.name, r.levelno) for r in caplog.records] == [("fastnabla", logging.WARNING)]
    assert caplog.records[0].getMessage() == (
        f"prompts.source = {source!r}: dropped 3 of 6 prompts, which are duplicates"
    )


def test_no_warning_without_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    load_prompts(write(tmp_path, b"a cat\nA cat\n"), ("{}", "{} again"))
    assert not caplog.records


def test_messages_name_the_given_field():
    with pytest.raises(ValueError, match=r"^prompts\.evaluation = 'missing\.txt': no such file"):
        load_prompts("missing.txt", field="prompts.evaluation")


@pytest.mark.slow
def test_a_million_prompts(tmp_path: Path):
    source = write(tmp_path, b"".join(b"prompt %d\n" % i for i in range(10**6)))
    prompts = load_prompts(source)
    assert Counter(map(len, prompts)) == {7 + digits: 9 * 10 ** (digits - 1) + (digits == 1) for digits in range(1, 7)}
