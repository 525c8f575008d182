"""Loading prompts: from a source and templates to a list."""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from fastnabla.config.model_sections import BadLines
from fastnabla.prompts.columns import WITHOUT
from fastnabla.prompts.entries import Entries, Unreadable
from fastnabla.prompts.files import read_file
from fastnabla.prompts.hub import read_hub
from fastnabla.prompts.published import ORIGIN, PUBLISHED_SETS, read_published
from fastnabla.prompts.sets import PROMPT_SETS
from fastnabla.utils.printable import CONTROL

MAX_PROMPT = 10_000
"""Longest prompt, in characters. No text encoder reads this many."""
MAX_NAMED = 5
"""Bad lines that a message names."""

logger = logging.getLogger("fastnabla")
_HUB = re.compile(r"hf:([^:]+)(?::([^:]*)(?::(.+))?)?")


def load_prompts(
    source: str,
    templates: Sequence[str] = (),
    field: str = "prompts.source",
    column: str | None = None,
    bad_lines: BadLines = "refuse",
) -> list[str]:
    """Load the unique prompts of a source, in its order.

    Surrounding white space is stripped. Duplicates are dropped, with one warning.

    Args:
        source: one of the following.

            - One of the `PROMPT_SETS`.
            - ``hf:OWNER/NAME``, ``hf:OWNER/NAME:COLUMN`` or ``hf:OWNER/NAME:COLUMN:SPLIT``: a column of a data set on the
              Hugging Face Hub. The default split is train. An empty ``COLUMN`` is `column`.
            - ``FOLDER:SET``: one of the `PUBLISHED_SETS`, from a folder of the authors' files.
            - ``FILE`` or ``FILE:COLUMN``: see `fastnabla.prompts.files.read_file`.

        templates: texts with one ``{}`` each. Every prompt is inserted into every template, and the results for one prompt
            are adjacent.
        field: name of the configuration field, for messages.
        column: column or field that has the prompts, unless `source` names it. None: the one called prompt or prompts.
        bad_lines: what happens to prompts that are not text, are empty, are longer than `MAX_PROMPT` or contain a control
            character, and to lines that cannot be read. "skip" leaves them out, with one warning.

    Raises:
        ValueError: the source cannot be read or has no prompts; it has bad lines, which are counted, and the first
            `MAX_NAMED` named; or a template does not contain exactly one ``{}``.
    """
    templates = [_checked_template(template) for template in templates] or ["{}"]
    try:
        prompts, bad = _checked(_read(source, column))
        if bad and (bad_lines == "refuse" or not prompts):
            raise ValueError(_refusal(bad, len(prompts)))
        if not prompts:
            raise ValueError("has no prompts; write one per line.")
    except (ValueError, OSError) as error:
        raise ValueError(f"{field} = {source!r}: {error}") from error
    if bad:
        total = len(prompts) + len(bad)
        logger.warning("%s = %r: skipped bad lines, %d of %d; the first: %s", field, source, len(bad), total, bad[0])
    filled = [template.replace("{}", prompt) for prompt in prompts for template in templates]
    unique = list(dict.fromkeys(filled))
    if len(unique) < len(filled):
        logger.warning(
            "%s = %r: dropped %d of %d prompts, which are duplicates",
            field,
            source,
            len(filled) - len(unique),
            len(filled),
        )
    return unique


def _checked(entries: Entries) -> tuple[list[str], list[str]]:
    """The valid prompts, and "place: reason" of each bad line."""
    prompts, bad = [], []
    for place, value in entries:
        try:
            if isinstance(value, Unreadable):
                raise ValueError(value.reason)
            prompt = checked_prompt(value)
            if not prompt:
                raise ValueError("is empty.")
            prompts.append(prompt)
        except ValueError as error:
            bad.append(f"{place}: {error}")
    return prompts, bad


def _refusal(bad: Sequence[str], good: int) -> str:
    named = "".join(f"\n  {line}" for line in bad[:MAX_NAMED])
    more = f"\n  and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    remedy = "\nCorrect them, or leave them out with --prompts.bad-lines skip." if good else ""
    return f"bad lines, {len(bad)} of {len(bad) + good}:{named}{more}{remedy}"


def _read(source: str, column: str | None) -> Entries:
    source = os.path.expanduser(source)
    if source in PROMPT_SETS:
        if column is not None:
            raise ValueError(f"a set has no column {column!r}; {WITHOUT}")
        return [(f"prompt {number}", prompt) for number, prompt in enumerate(PROMPT_SETS[source], 1)]
    if source.startswith("hf:"):
        hub = _HUB.fullmatch(source)
        if hub is None:
            raise ValueError("write hf:OWNER/NAME:COLUMN, or hf:OWNER/NAME:COLUMN:SPLIT.")
        return read_hub(hub[1], hub[2] or column, hub[3] or "train")
    folder, _, name = source.rpartition(":")
    if name in PUBLISHED_SETS and not os.path.isfile(folder) and not os.path.isfile(source):
        if not folder:
            raise ValueError(f"a published set; write FOLDER:{name}, with the path of a copy of {ORIGIN}.")
        if column is not None:
            raise ValueError(f"a set has no column {column!r}; {WITHOUT}")
        return read_published(folder, name)
    path, own = _path_and_column(source)
    return read_file(path, column if own is None else own)


def _path_and_column(source: str) -> tuple[str, str | None]:
    """Split FILE:COLUMN. Both may contain colons, so FILE is the longest part that is a file."""
    path = source
    while not os.path.isfile(path):
        path, colon, _ = path.rpartition(":")
        if not colon:
            if os.path.isdir(source):
                raise ValueError("is a folder; give a file in it.")
            raise ValueError(
                f"no such file, and not one of the sets {', '.join(PROMPT_SETS)}. Give a text file with one prompt per line, "
                "a JSON, JSON Lines, CSV or TSV file, FILE:COLUMN, FOLDER:SET with one of the paper's sets "
                f"{', '.join(PUBLISHED_SETS)}, or hf:OWNER/NAME:COLUMN."
            )
    column = source[len(path) + 1 :] if path != source else None
    if column == "":
        raise ValueError("write a column after the colon, as in FILE:COLUMN, or leave the colon out.")
    return path, column


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
    if control and "\udc80" <= control[0] <= "\udcff":
        raise ValueError(f"not UTF-8 text (byte 0x{ord(control[0]) - 0xDC00:02X}); save the file as UTF-8.")
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
