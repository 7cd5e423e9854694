"""report.md: GitHub's Markdown, with the plots beside it."""

import re
from collections.abc import Sequence

from . import table
from .drawing import Picture
from .facts import Report
from .short import short
from .summary import summary
from .text import plain


def render(report: Report, pictures: Sequence[Picture]) -> str:
    """The whole page; `pictures` are referred to by the names of their PNG files."""
    parts = [f"# Attention swaps in {escape(plain(report['model']['name']))}"]
    parts += ["\n".join(f"- **{what}**: {escape(said)}" for what, said in short(report))] if short(report) else []
    parts += _figure(pictures[0]) if pictures else []
    for name, rows in table.tables(report).items():
        parts += [f"## {name}", markdown_table(rows)]
    for picture in pictures[1:]:
        parts += _figure(picture)
    parts += ["## In words", *(escape(paragraph) for paragraph in summary(report))]
    parts += [f"## {table.ARMS}", markdown_table(table.arm_rows(report))]
    parts += ["## How it was measured"]
    parts += ["\n".join(f"- {key}: {escape(value)}" for key, value in table.details(report))]
    return "\n\n".join(parts) + "\n"


def _figure(picture: Picture) -> list[str]:
    return [f"## {picture.title}", f"![{picture.title}]({picture.name}.png)", escape(picture.caption)]


def escape(words: str) -> str:
    """`words` as Markdown shows them literally, also inside a table cell."""
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|$~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", words)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """`rows`, the first of them the header, as a table."""
    lines = [" | ".join(escape(cell) for cell in row) for row in rows]
    lines.insert(1, " | ".join("---" for _ in rows[0]))
    return "\n".join(f"| {line} |" for line in lines)
