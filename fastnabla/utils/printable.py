"""Makes untrusted text safe to print to a terminal, a log or a picture."""

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""C0, DEL and C1; line and paragraph separators, bidirectional embeddings and overrides; bidirectional isolates; lone
surrogates, as in paths that are not UTF-8; byte order marks."""


def printable(text: str) -> str:
    """`text` with control characters escaped as in Python, except line feeds and tabs."""
    return CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else repr(match[0])[1:-1], text)
