"""Training, held-out and evaluated prompts."""

import dataclasses
import itertools
import logging
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastnabla.config.model_sections import PromptConfig
from fastnabla.prompts import RunPrompts, load_prompts, prompts_of, split_prompts

MANY = [f"prompt {i}" for i in range(2000)]


def test_split_does_not_change_between_versions():
    assert split_prompts(MANY[:20], 0.2, seed=0)[1] == ["prompt 4", "prompt 8"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_share_is_met_on_average(share: float):
    trained, held_out = split_prompts(MANY, share, seed=1)
    assert trained == [p for p in MANY if p not in set(held_out)]
    # The standard deviation of the share is at most 0.5 / √2000 = 0.011; 0.05 is more than four of them.
    assert abs(len(held_out) / len(MANY) - share) < 0.05


def test_seeds_hold_out_others():
    first, second = (set(split_prompts(MANY, 0.5, seed)[1]) for seed in (0, 1))
    # Agreement by chance: half of either, ±0.011.
    assert abs(len(first & second) / len(MANY) - 0.25) < 0.05


@pytest.mark.slow
@given(
    prompts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=2, max_size=40, unique=True),
    kept=st.data(),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63),
)
def test_other_prompts_move_none(prompts: list[str], kept: st.DataObject, share: float, seed: int):
    part = kept.draw(st.lists(st.sampled_from(prompts), min_size=2, unique=True))
    try:
        trained, held_out = split_prompts(prompts, share, seed)
        trained_part, held_out_part = split_prompts(part, share, seed)
    except ValueError:
        assume(False)
    assert sorted(trained + held_out) == sorted(prompts)
    assert set(trained_part) <= set(trained) and set(held_out_part) <= set(held_out)


@pytest.mark.parametrize("seed", range(5))
def test_larger_shares_hold_out_more_never_others(seed: int):
    shares = [set(split_prompts(MANY, share, seed)[1]) for share in (0.1, 0.2, 0.5, 0.8)]
    assert all(small < large for small, large in itertools.pairwise(shares))


@pytest.mark.parametrize(("share", "parts"), [(1e-9, "10 of 10"), (1 - 1e-9, "0 of 10")])
def test_empty_parts_are_refused(share: float, parts: str):
    with pytest.raises(ValueError, match=r"prompts\.held_out = .*: leaves " + parts + ".*prompts.evaluation"):
        split_prompts(MANY[:10], share, seed=0)


def run_prompts(source: str, templates=(), held_out=0.0, evaluation=None, most_evaluated=10, seed=0) -> RunPrompts:
    config = PromptConfig(source=source, template=templates, held_out=held_out, evaluation=evaluation)
    return prompts_of(config, most_evaluated, seed)


def test_without_a_split_the_first_prompts_are_evaluated():
    assert run_prompts("animals") == RunPrompts(texts=load_prompts("animals"), trained=10, evaluated=range(10))
    assert run_prompts("simple-animals", most_evaluated=4) == RunPrompts(
        texts=load_prompts("simple-animals"), trained=45, evaluated=range(4)
    )


def test_held_out_prompts_are_evaluated_and_not_trained_on():
    prompts = run_prompts("simple-animals", held_out=0.4, most_evaluated=6)
    trained, held_out = split_prompts(load_prompts("simple-animals"), 0.4, seed=0)
    assert prompts.texts[: prompts.trained] == trained
    assert [prompts.texts[i] for i in prompts.evaluated] == held_out[:6]


def test_evaluation_source_is_evaluated_with_the_same_templates(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "evaluation.txt"
    path.write_text("a lynx\na yak\n", encoding="utf-8")
    prompts = run_prompts("animals", templates=("{}, etching",), evaluation=str(path))
    assert prompts.trained == 10 and prompts.texts[0] == "a bear, etching"
    assert [prompts.texts[i] for i in prompts.evaluated] == ["a lynx, etching", "a yak, etching"]
    assert not caplog.records


def test_evaluating_what_is_trained_on_is_warned_of(caplog: pytest.LogCaptureFixture):
    prompts = run_prompts("animals", evaluation="animals-phrased", most_evaluated=2)
    assert [prompts.texts[i] for i in prompts.evaluated] == ["a bear", "a picture of a bear"]
    assert [(r.name, r.levelno) for r in caplog.records] == [("fastnabla", logging.WARNING)]
    assert caplog.messages == ["prompts.evaluation = 'animals-phrased': 10 of 30 prompts are also training prompts"]


def test_bad_evaluation_source_is_named():
    with pytest.raises(ValueError, match=r"^prompts\.evaluation = 'missing\.txt': no such file"):
        run_prompts("animals", evaluation="missing.txt")


def test_column_and_bad_lines_are_those_of_both_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sources = tmp_path / "trained.csv", tmp_path / "evaluated.jsonl"
    sources[0].write_text("id,text\n1,a cat\n2,\n3,a dog\n", encoding="utf-8")
    sources[1].write_text('{"text": "a lynx"}\n{"text": 5}\n', encoding="utf-8")
    config = PromptConfig(source=str(sources[0]), evaluation=str(sources[1]), column="text", bad_lines="skip")
    assert prompts_of(config, 10, 0) == RunPrompts(texts=["a cat", "a dog", "a lynx"], trained=2, evaluated=range(2, 3))
    assert [message.split(" = ")[0] for message in caplog.messages] == ["prompts.source", "prompts.evaluation"]
    refused = dataclasses.replace(config, bad_lines="refuse", source="animals", column=None)
    refused.evaluation += ":text"
    with pytest.raises(
        ValueError, match=r"^prompts\.evaluation = .*bad lines, 1 of 2:\n  line 2: a prompt must be text"
    ):
        prompts_of(refused, 10, 0)
    with pytest.raises(ValueError, match=r"prompts\.column = ''"):
        PromptConfig(column="")
