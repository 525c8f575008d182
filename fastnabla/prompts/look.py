"""A look at the prompts of a run, printed when it starts."""

from collections.abc import Sequence

from fastnabla.prompts.split import RunPrompts

SHOWN = 160
"""Longest text shown, in characters."""


def look(prompts: RunPrompts) -> str:
    """The number of prompts, the first three and the longest, as lines of text; separately for prompts that are only evaluated."""
    trained, evaluated = prompts.texts[: prompts.trained], prompts.evaluated
    separate = evaluated.start >= prompts.trained
    lines = [f"prompts to train on: {len(trained)}" + ("" if separate else f"; evaluated: {len(evaluated)} of them")]
    lines += _sample(trained)
    if separate:
        lines += [f"prompts to evaluate: {len(evaluated)}", *_sample([prompts.texts[i] for i in evaluated])]
    return "\n".join(lines)


def _sample(texts: Sequence[str]) -> list[str]:
    longest = max(texts, key=len)
    return [*(f"  {_short(text)}" for text in texts[:3]), f"  longest, {len(longest)} characters: {_short(longest)}"]


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
