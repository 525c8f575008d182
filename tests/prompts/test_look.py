"""The look at a run's prompts."""

from fastnabla.prompts import RunPrompts, look


def test_count_first_three_and_longest() -> None:
    texts = ["a cat", "a dog", "a cow", "a donkey", "a hen"]
    assert look(RunPrompts(texts=texts, trained=5, evaluated=range(2))).split("\n") == [
        "prompts to train on: 5; evaluated: 2 of them",
        "  a cat",
        "  a dog",
        "  a cow",
        "  longest, 8 characters: a donkey",
    ]


def test_separate_prompts_are_shown_too() -> None:
    texts = ["a cat", "x" * 500, "a giraffe"]
    lines = look(RunPrompts(texts=texts, trained=2, evaluated=range(2, 3))).split("\n")
    assert lines[:2] == ["prompts to train on: 2", "  a cat"]
    assert lines[3].startswith("  longest, 500 characters: xxx") and lines[3].endswith("x…") and len(lines[3]) < 200
    assert lines[4:] == ["prompts to evaluate: 1", "  a giraffe", "  longest, 9 characters: a giraffe"]
