"""Text from outside on a terminal, in a log line or a picture: nothing in it acts."""

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""C0, DEL and C1; line and paragraph separators, embeddings and overrides of direction; isolates; half characters, which
a path that is not UTF-8 has; byte order marks."""


def printable(text: str) -> str:
    """`text` with control characters as Python escapes them, but for line feeds and tabs."""
    return CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else repr(match[0])[1:-1], text)
