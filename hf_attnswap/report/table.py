"""Hold one table, and show it in the terminal and in Markdown; the template of the page has the HTML."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from .text import plain
from .types import Arm

Row = TypeVar("Row")
WORDS = ("cost", "status", "note", "formula", "options", "source", "least damage first", "on its way")  # may wrap
MARK = "†"  # stands beside a trained softmax
NOISE = "‡"


@dataclass(frozen=True)
class Column:
    """Describe a column: its title, and the function that makes the text of a cell from a row."""

    title: str
    cell: Callable[..., str]


@dataclass(frozen=True)
class Table:
    """Hold plain text by row and column; `notes` stand below and say what is marked or missing."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    @classmethod
    def of(cls, title: str, columns: Sequence[Column], rows: Iterable[Row], notes: Sequence[str] = ()) -> "Table":
        """Return a table of what the columns show of each row."""
        shown = [[column.cell(row) for column in columns] for row in rows]
        return cls(title, [column.title for column in columns], shown, [note for note in notes if note])

    @property
    def arm(self) -> int:
        """Return the place of the column with the arms."""
        return self.header.index("arm")

    def is_control(self, row: Sequence[str]) -> bool:
        """Return whether a row is that of a control."""
        return row[self.arm].endswith("(control)")

    def begins(self, index: int) -> bool:
        """Return whether row `index` begins a group: another length or another run than the row above."""
        return self.arm > 0 and index > 0 and self.rows[index][0] != self.rows[index - 1][0]


def name(arm: Arm) -> str:
    """Return the label of an arm, with "(control)" behind that of a control."""
    label = " ".join("".join(c if c.isprintable() else " " for c in arm.label).split())
    return f"{label} (control)" if arm.control else label


def two_lines(cell: str) -> str:
    """Return the cell with its closing parentheses, an interval as a rule, on a second line."""
    return re.sub(rf" (\([^()]*\)\*?[{MARK}{NOISE}]*)$", r"\n\1", cell)


def terminal(table: Table, folds: bool = True) -> RichTable:
    """Return the table for a terminal.

    Args:
        folds: whether intervals stand below their values and long cells are folded; else long cells are cut.
    """
    caption = "\n".join(table.notes)
    shown = RichTable(
        title=table.title or None, title_justify="left", header_style="bold", box=SIMPLE_HEAD if folds else None,
        pad_edge=False, collapse_padding=not folds, caption=Text(caption) if caption else None, caption_justify="left",
    )  # fmt: skip
    in_lines = two_lines if folds else str
    for index, column in enumerate(table.header):
        lines = [line for row in table.rows for line in in_lines(row[index]).splitlines()]
        longest = max(map(len, [*lines, *column.split()]), default=0)
        # A header wraps rather than widen a column of numbers. No minimum: rich would crop what does not fit.
        most = None if column in WORDS or not folds else longest
        shown.add_column(Text(column), overflow="fold" if folds else "ellipsis", no_wrap=not folds, max_width=most)
    for index, row in enumerate(table.rows):
        last = index + 1 < len(table.rows) and table.begins(index + 1)
        style = "dim" if table.is_control(row) else ""
        # Text, not str: [brackets] in a label or a reason are no markup.
        shown.add_row(*[Text(in_lines(cell)) for cell in row], style=style, end_section=last)
    return shown


def escape(words: str) -> str:
    """Return `words` as Markdown shows them literally, also inside a table cell."""
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|$~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", words)


def markdown(table: Table) -> str:
    """Return the table in GitHub's Markdown, its notes below; the title is left to the page."""
    lines = [" | ".join(escape(plain(cell)) for cell in row) for row in [table.header, *table.rows]]
    lines.insert(1, " | ".join("---" for _ in table.header))
    return "\n\n".join(["\n".join(f"| {line} |" for line in lines), *map(escape, table.notes)])
