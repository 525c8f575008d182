"""Loading prompts: from a source and templates to a list."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fastnabla.prompts.readers import read_hub, read_json_lines, read_lines
from fastnabla.prompts.sets import PROMPT_SETS
from fastnabla.utils.printable import CONTROL

MAX_PROMPT = 10_000
"""Longest prompt, in characters. No text encoder reads this many."""

_HUB = re.compile(r"hf:([^:]+):([^:]+)(?::(.+))?")
_JSON_LINES = re.compile(r"(.+\.jsonl)(?::(.+))?", re.DOTALL)


def load_prompts(source: str, templates: Sequence[str] = (), field: str = "prompts.source") -> list[str]:
    """Load the unique prompts of a source, in its order.

    Surrounding white space is stripped and blank prompts are skipped. Duplicates are dropped, with one warning.

    Args:
        source: one of the following.

            - One of the `PROMPT_SETS`.
            - ``hf:OWNER/NAME:COLUMN`` or ``hf:OWNER/NAME:COLUMN:SPLIT``: a column of a data set on the Hugging Face hub.
              The default split is train.
            - ``FILE.jsonl`` or ``FILE.jsonl:FIELD``: a field of a JSON Lines file. The default field is prompt.
            - Any other UTF-8 text file, with one prompt per line.

        templates: texts with one ``{}`` each. Every prompt is inserted into every template, and the results for one prompt
            are adjacent.
        field: name of the configuration field, for messages.

    Raises:
        ValueError: the source cannot be read or has no prompts; a prompt is not text, is longer than `MAX_PROMPT` or
            contains a control character; or a template does not contain exactly one ``{}``.
    """
    templates = [_checked_template(template) for template in templates] or ["{}"]
    try:
        prompts = list(_entries(source))
    except (ValueError, OSError) as error:
        raise ValueError(f"{field} = {source!r}: {error}") from error
    if not prompts:
        raise ValueError(f"{field} = {source!r}: has no prompts; write one per line.")
    filled = [template.replace("{}", prompt) for prompt in prompts for template in templates]
    unique = list(dict.fromkeys(filled))
    if len(unique) < len(filled):
        logging.getLogger("fastnabla").warning(
            "%s = %r: dropped %d of %d prompts, which are duplicates",
            field,
            source,
            len(filled) - len(unique),
            len(filled),
        )
    return unique


def _entries(source: str) -> Iterator[str]:
    """Yield the checked prompts of `source`, without blank ones."""
    for place, value in _read(source):
        try:
            prompt = checked_prompt(value)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if prompt:
            yield prompt


def _read(source: str) -> Iterator[tuple[str, Any]]:
    if source in PROMPT_SETS:
        return ((f"prompt {i}", prompt) for i, prompt in enumerate(PROMPT_SETS[source]))
    if source.startswith("hf:"):
        hub = _HUB.fullmatch(source)
        if hub is None:
            raise ValueError("write hf:OWNER/NAME:COLUMN, or hf:OWNER/NAME:COLUMN:SPLIT.")
        return read_hub(hub[1], hub[2], hub[3] or "train")
    json_lines = _JSON_LINES.fullmatch(source)
    path = json_lines[1] if json_lines else source
    if not os.path.isfile(path):
        raise ValueError(
            f"no such file, and not one of the sets {', '.join(PROMPT_SETS)}. Give a UTF-8 text file with one prompt per "
            "line, FILE.jsonl:FIELD, or hf:OWNER/NAME:COLUMN."
        )
    return read_json_lines(path, json_lines[2] or "prompt") if json_lines else read_lines(path)


def checked_prompt(value: Any) -> str:
    """Check a prompt and strip surrounding white space.

    Raises:
        ValueError: `value` is not text, is longer than `MAX_PROMPT` or contains a control character.
    """
    if not isinstance(value, str):
        raise ValueError(f"a prompt must be text, not {type(value).__name__}; give another field or column.")
    prompt = value.strip()
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"has {len(prompt)} characters; shorten it to at most {MAX_PROMPT}.")
    control = CONTROL.search(prompt)
    if control:
        raise ValueError(f"contains the control character U+{ord(control[0]):04X}; remove it.")
    return prompt


def _checked_template(template: str) -> str:
    try:
        checked = checked_prompt(template)
        if checked.count("{}") != 1:
            raise ValueError('must contain exactly one {} for the prompt, as in "a photo of {}".')
    except ValueError as error:
        raise ValueError(f"prompts.template = {template!r}: {error}") from error
    return checked
