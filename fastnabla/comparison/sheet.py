"""A table of text, which is written in Markdown or on a page."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Sheet:
    """A table of strings."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    """Number of leading columns with text, which are aligned to the left; the others have numbers."""

    def markdown(self) -> str:
        """The table in Markdown, below its title."""
        rule = ["---" if number < self.texts else "---:" for number in range(len(self.columns))]
        lines = [self.columns, rule, *self.rows]
        return f"{self.title}\n\n" + "".join("| " + " | ".join(map(_markdown_cell, line)) + " |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")
