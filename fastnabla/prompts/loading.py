"""From a source and templates to a list of prompts."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fastnabla.prompts.readers import read_hub, read_json_lines, read_lines
from fastnabla.prompts.sets import PROMPT_SETS
from fastnabla.utils.printable import CONTROL

MAX_PROMPT = 10_000
"""Longest prompt, in characters; no text encoder reads as much."""

_HUB = re.compile(r"hf:([^:]+):([^:]+)(?::(.+))?")
_JSON_LINES = re.compile(r"(.+\.jsonl)(?::(.+))?", re.DOTALL)


def load_prompts(source: str, templates: Sequence[str] = (), field: str = "prompts.source") -> list[str]:
    """The prompts of a source, in its order, each once.

    Surrounding white space is stripped and blank prompts are skipped. Prompts that repeat an earlier one are dropped,
    with one warning.

    Args:
        source: one of the `PROMPT_SETS`; ``hf:OWNER/NAME:COLUMN`` or ``hf:OWNER/NAME:COLUMN:SPLIT``, a column of a data
            set on the Hugging Face hub (split: train); ``FILE.jsonl`` or ``FILE.jsonl:FIELD``, a field of JSON lines
            (prompt); or any other UTF-8 text file, one prompt a line.
        templates: texts with one ``{}`` each; every prompt is put into every one, a prompt's own staying together.
        field: configuration field that names the source in messages.

    Raises:
        ValueError: the source cannot be read or has no prompts; a prompt is not text, is longer than `MAX_PROMPT` or
            has a control character; or a template does not have exactly one ``{}``.
    """
    templates = [_checked_template(template) for template in templates] or ["{}"]
    try:
        prompts = list(_entries(source))
    except (ValueError, OSError) as error:
        raise ValueError(f"{field} = {source!r}: {error}") from error
    if not prompts:
        raise ValueError(f"{field} = {source!r}: has no prompts; write one a line.")
    phrased = [template.replace("{}", prompt) for prompt in prompts for template in templates]
    unique = list(dict.fromkeys(phrased))
    if len(unique) < len(phrased):
        logging.getLogger("fastnabla").warning(
            "%s = %r: %d of %d prompts repeat an earlier one and are dropped",
            field,
            source,
            len(phrased) - len(unique),
            len(phrased),
        )
    return unique


def _entries(source: str) -> Iterator[str]:
    """The prompts of `source` that are not blank, checked."""
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
            f"no such file, nor one of the sets {', '.join(PROMPT_SETS)}. Give a UTF-8 text file with one prompt a "
            "line, FILE.jsonl:FIELD, or hf:OWNER/NAME:COLUMN."
        )
    return read_json_lines(path, json_lines[2] or "prompt") if json_lines else read_lines(path)


def checked_prompt(value: Any) -> str:
    """The prompt `value`, stripped.

    Raises:
        ValueError: it is not text, is longer than `MAX_PROMPT` or has a control character.
    """
    if not isinstance(value, str):
        raise ValueError(f"a prompt must be text, not {type(value).__name__}; name another field or column.")
    prompt = value.strip()
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"{len(prompt)} characters; shorten it to at most {MAX_PROMPT}.")
    control = CONTROL.search(prompt)
    if control:
        raise ValueError(f"has the control character U+{ord(control[0]):04X}; remove it.")
    return prompt


def _checked_template(template: str) -> str:
    try:
        checked = checked_prompt(template)
        if checked.count("{}") != 1:
            raise ValueError('must contain exactly one {}, where the prompt goes, as in "a photo of {}".')
    except ValueError as error:
        raise ValueError(f"prompts.template = {template!r}: {error}") from error
    return checked
