"""Which prompts are trained on, and which are evaluated."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from fastnabla.prompts.loading import checked_prompt, load_prompts
from fastnabla.utils.durable import write_file
from fastnabla.utils.typed_json import parse


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunPrompts:
    """The prompts of a run, numbered."""

    texts: list[str]
    """By number; those trained on come first."""
    trained: int
    """Numbers below are trained on."""
    evaluated: range
    """Numbers that are evaluated."""

    def to_json(self) -> str:
        """What `load` reads, a prompt a line."""
        evaluated = [self.evaluated.start, self.evaluated.stop]
        values = {"trained": self.trained, "evaluated": evaluated, "texts": self.texts}
        return json.dumps(values, ensure_ascii=False, indent=0) + "\n"

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        write_file(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "RunPrompts":
        """What `save` wrote.

        Raises:
            ValueError: the file cannot be read, or is not what `save` writes.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} cannot be read ({error}); it has the prompts of the run.") from error

    @classmethod
    def from_json(cls, text: str) -> "RunPrompts":
        """What `to_json` gave.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        values = parse(text)
        start, stop = values["evaluated"]
        prompts = cls(texts=values["texts"], trained=values["trained"], evaluated=range(start, stop))
        prompts.check()
        return prompts

    def check(self) -> None:
        """Make sure that these are prompts, numbered.

        Raises:
            ValueError: they are not.
        """
        if not isinstance(self.texts, list) or not all(isinstance(text, str) for text in self.texts):
            raise ValueError("texts: must be a list of texts")
        for text in self.texts:
            if checked_prompt(text) != text or not text:
                raise ValueError(f"texts: {text!r:.100} is blank, or has white space around it")
        if type(self.trained) is not int or not 0 < self.trained <= len(self.texts):
            raise ValueError(f"trained = {self.trained!r:.100}: must be from 1 to the {len(self.texts)} texts")
        if not 0 <= self.evaluated.start < self.evaluated.stop <= len(self.texts):
            raise ValueError(f"evaluated = {self.evaluated!r:.100}: must be among the {len(self.texts)} texts")


def split_prompts(prompts: Sequence[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """`prompts` to train on and those held out, both in their order.

    A hash of the seed and the prompt's text decides on each alone: prompts that are added, removed or reordered do not
    move others, and a larger share holds out more, never others. So the share is met only on average.

    Args:
        prompts: texts, each once.
        held_out: share to hold out, in (0, 1).
        seed: the run's.

    Raises:
        ValueError: a part is left empty.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for prompt in prompts:
        digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(prompt)
    if not all(parts):
        raise ValueError(
            f"prompts.held_out = {held_out!r}: leaves {len(parts[0])} of {len(prompts)} prompts to train on and "
            f"{len(parts[1])} to evaluate with seed = {seed}; change the share, give more prompts, or name those to "
            "evaluate with prompts.evaluation."
        )
    return parts


def load_run_prompts(
    source: str, templates: Sequence[str], held_out: float, evaluation: str | None, most_evaluated: int, seed: int
) -> RunPrompts:
    """The prompts that a run trains on and evaluates.

    Args:
        source: what is trained on; see `load_prompts`.
        templates: for the prompts of both sources.
        held_out: share of `source` that is evaluated instead; 0 for none.
        evaluation: source of the prompts that are evaluated, or None. With neither, those trained on are.
        most_evaluated: the first so many are evaluated.
        seed: the run's.

    Raises:
        ValueError: as `load_prompts` and `split_prompts`.
    """
    trained = load_prompts(source, templates)
    if evaluation is not None:
        evaluated = load_prompts(evaluation, templates, field="prompts.evaluation")
        seen = set(trained).intersection(evaluated)
        if seen:
            logging.getLogger("fastnabla").warning(
                "prompts.evaluation = %r: %d of %d prompts are also trained on", evaluation, len(seen), len(evaluated)
            )
    elif held_out:
        trained, evaluated = split_prompts(trained, held_out, seed)
    else:
        return RunPrompts(texts=trained, trained=len(trained), evaluated=range(min(most_evaluated, len(trained))))
    texts = trained + evaluated[:most_evaluated]
    return RunPrompts(texts=texts, trained=len(trained), evaluated=range(len(trained), len(texts)))
