"""The prompts that a run trains on, and those that it evaluates."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from fastnabla.config.model_sections import PromptConfig
from fastnabla.prompts.loading import checked_prompt, load_prompts
from fastnabla.utils.durable import write_file
from fastnabla.utils.typed_json import parse


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunPrompts:
    """The numbered prompts of a run."""

    texts: list[str]
    """Texts by number. Training prompts come first."""
    trained: int
    """Number of training prompts."""
    evaluated: range
    """Numbers of the evaluated prompts."""

    def to_json(self) -> str:
        """Serialise for `from_json`, with one prompt per line."""
        evaluated = [self.evaluated.start, self.evaluated.stop]
        values = {"trained": self.trained, "evaluated": evaluated, "texts": self.texts}
        return json.dumps(values, ensure_ascii=False, indent=0) + "\n"

    def save(self, path: Path) -> None:
        """Write the prompts to `path` as JSON."""
        write_file(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "RunPrompts":
        """Read the prompts that `save` wrote.

        Raises:
            ValueError: the file cannot be read, or was not written by `save`.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r}, the prompts of the run, cannot be read ({error}).") from error

    @classmethod
    def from_json(cls, text: str) -> "RunPrompts":
        """Parse the result of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: `text` is not such a result.
        """
        values = parse(text)
        start, stop = values["evaluated"]
        prompts = cls(texts=values["texts"], trained=values["trained"], evaluated=range(start, stop))
        prompts.check()
        return prompts

    def check(self) -> None:
        """Validate the fields.

        Raises:
            ValueError: a field is invalid.
        """
        if not isinstance(self.texts, list) or not all(isinstance(text, str) for text in self.texts):
            raise ValueError("texts: must be a list of strings")
        for text in self.texts:
            if checked_prompt(text) != text or not text:
                raise ValueError(f"texts: {text!r:.100} is blank, or has white space around it")
        if type(self.trained) is not int or not 0 < self.trained <= len(self.texts):
            raise ValueError(
                f"trained = {self.trained!r:.100}: must be from 1 to {len(self.texts)}, the number of texts"
            )
        if not 0 <= self.evaluated.start < self.evaluated.stop <= len(self.texts):
            raise ValueError(f"evaluated = {self.evaluated!r:.100}: must be numbers of the {len(self.texts)} texts")


def split_prompts(prompts: Sequence[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """Split `prompts` into training prompts and held-out prompts. Both keep their order.

    A hash of the seed and the text decides for each prompt. So adding, removing or reordering prompts does not move the
    others, and a larger fraction holds out a superset. The fraction is met only on average.

    Args:
        prompts: unique texts.
        held_out: fraction to hold out, in (0, 1).
        seed: seed of the run.

    Raises:
        ValueError: one of the parts is empty.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for prompt in prompts:
        digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(prompt)
    if not all(parts):
        raise ValueError(
            f"prompts.held_out = {held_out!r}: leaves {len(parts[0])} of {len(prompts)} prompts to train on and "
            f"{len(parts[1])} to evaluate with seed = {seed}; change the fraction, give more prompts, or give those to "
            "evaluate with prompts.evaluation."
        )
    return parts


def prompts_of(config: PromptConfig, most_evaluated: int, seed: int) -> RunPrompts:
    """Load the prompts that a run trains on and evaluates.

    Without `held_out` and `evaluation`, training prompts are evaluated.

    Args:
        config: the sources, the column, templates and treatment of bad lines of both, and the fraction that is held out.
        most_evaluated: largest number of evaluated prompts; the first ones are taken.
        seed: seed of the run.

    Raises:
        ValueError: see `load_prompts` and `split_prompts`.
    """
    held_out, evaluation = config.held_out, config.evaluation
    load = functools.partial(load_prompts, templates=config.template, column=config.column, bad_lines=config.bad_lines)
    trained = load(config.source)
    if evaluation is not None:
        evaluated = load(evaluation, field="prompts.evaluation")
        seen = set(trained).intersection(evaluated)
        if seen:
            logging.getLogger("fastnabla").warning(
                "prompts.evaluation = %r: %d of %d prompts are also training prompts",
                evaluation,
                len(seen),
                len(evaluated),
            )
    elif held_out:
        trained, evaluated = split_prompts(trained, held_out, seed)
    else:
        return RunPrompts(texts=trained, trained=len(trained), evaluated=range(min(most_evaluated, len(trained))))
    texts = trained + evaluated[:most_evaluated]
    return RunPrompts(texts=texts, trained=len(trained), evaluated=range(len(trained), len(texts)))
