"""Prompts that the text encoder truncates."""

import logging

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from fastnabla.prompts import warn_truncated
from fastnabla.prompts.length import CHUNK
from fastnabla.testbed import pipeline_folder


@pytest.fixture(scope="module")
def clip():
    """The testbed's tokenizer: 16 tokens, including start and end."""
    return AutoTokenizer.from_pretrained(pipeline_folder() / "tokenizer")


def words(limit: int | None) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word and no start or end token."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=limit)


def test_one_warning_gives_number_and_first(clip, caplog: pytest.LogCaptureFixture):
    prompts = ["a cat", " ".join(["zebra"] * 15), " ".join(["zebra"] * 14), " ".join(["cow"] * 40)]
    warn_truncated(prompts, clip)
    assert [(r.name, r.levelno) for r in caplog.records] == [("fastnabla", logging.WARNING)]
    assert caplog.messages == [
        "2 of the run's 4 prompts are longer than the 16 tokens of the text encoder, which ignores the rest; the first: "
        + repr(prompts[1])
    ]


@pytest.mark.parametrize("repeats", [1, 13, 14, 15, 16, 200])
def test_warns_exactly_where_the_pipeline_cuts(clip, repeats: int, caplog: pytest.LogCaptureFixture):
    prompt = " ".join(["zebra"] * repeats)
    whole, cut = (clip(prompt, truncation=cut, max_length=16, verbose=False).input_ids for cut in (False, True))
    warn_truncated([prompt], clip)
    assert bool(caplog.records) == (whole != cut)


def test_tokenizers_written_in_python(caplog: pytest.LogCaptureFixture):
    # A token a byte, and one for the end.
    warn_truncated(["a catty", "a cattle"], ByT5Tokenizer(model_max_length=8))
    assert caplog.messages[0].startswith("1 of the run's 2 prompts") and caplog.messages[0].endswith("'a cattle'")


def test_with_two_tokenizers_a_prompt_counts_once(clip, caplog: pytest.LogCaptureFixture):
    prompts = ["one two", "one two three", " ".join(["zebra"] * 30)]
    warn_truncated(prompts, clip, words(limit=2))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("2 of the run's 3 prompts are longer than the 2 and 16 tokens")
    assert caplog.messages[0].endswith("'one two three'")


def test_tokenizer_without_a_limit_cuts_nothing(caplog: pytest.LogCaptureFixture):
    warn_truncated(["word " * 5000], words(limit=None))
    assert not caplog.records


def test_all_chunks_are_looked_at(caplog: pytest.LogCaptureFixture):
    prompts = ["one"] * (2 * CHUNK + 3)
    prompts[CHUNK] = prompts[-1] = "one two three"
    warn_truncated(prompts, words(limit=2))
    assert caplog.messages[0].startswith(f"2 of the run's {2 * CHUNK + 3} prompts")


def test_a_very_long_prompt_is_not_printed_whole(caplog: pytest.LogCaptureFixture):
    warn_truncated(["word " * 2000], words(limit=2))
    assert len(caplog.messages[0]) < 400 and caplog.messages[0].endswith("…'")
