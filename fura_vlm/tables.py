"""Tables: drawn on a terminal, Markdown in files and pipes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table as Drawn
from rich.text import Text

LONGEST = 12  # letters of a word that a narrow terminal leaves whole
_EMPHASIS = re.compile(r"(?<![\w*])\*(\w+)\*(?![\w*])")


@dataclass
class Table:
    """A table of words and numbers.

    Args:
        head: names of the columns.
        rows: cells, as many as ``head`` has.
        left: how many columns hold words, the first ones; the others hold numbers and are aligned to the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        """With what would end a cell or a line escaped."""
        lines = ["|" + "|".join("---" if n < self.left else "---:" for n in range(len(self.head))) + "|"]
        lines += [_line(row) for row in self.rows]
        return "\n".join([_line(self.head), *lines])

    def drawn(self, title: str | None = None) -> Drawn:
        """As rich draws it. Numbers and short words stay whole; what is long is folded."""
        table = Drawn(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for number, name in enumerate(self.head):
            is_left = number < self.left
            longest = max(map(len, " ".join([name, *(row[number] for row in self.rows)]).split()), default=0)
            width = min(longest, LONGEST) if is_left else longest
            table.add_column(name, justify="left" if is_left else "right", min_width=width, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text.from_markup(_EMPHASIS.sub(r"[italic]\1[/italic]", escape(cell))) for cell in row))
        return table


def markdown(parts: Sequence[str | Table]) -> str:
    """Paragraphs in Markdown and tables as one text."""
    return "\n\n".join(part.markdown() if isinstance(part, Table) else part for part in parts) + "\n"


def show(parts: Sequence[str | Table]) -> None:
    """Prints paragraphs in Markdown and tables: as rich draws them on a terminal, as Markdown anywhere else."""
    console = Console()
    if not console.is_terminal:
        print(markdown(parts), end="")
        return
    for number, part in enumerate(parts):
        if number and isinstance(part, str):
            console.print()
        console.print(part.drawn() if isinstance(part, Table) else Markdown(part))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"
