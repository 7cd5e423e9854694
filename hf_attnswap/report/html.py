"""report.html: one file that opens from disk, without network and without script, on a phone as on a desk."""

import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape

from . import table
from .drawing import Picture
from .facts import Report
from .short import short
from .summary import summary
from .text import plain

# The policy makes "no network" a property that the browser enforces.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --soft: #5a5a5a; --line: #d4d4d4;
  --band: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --soft: #a8a8a8; --line: #3c3c3c; --band: #202020; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, dd, figcaption { max-width: 46rem; overflow-wrap: anywhere; }
p { margin: 0 0 .75rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: pre; background: var(--paper); }
thead th { background: var(--band); white-space: normal; }
tbody th { font-weight: 600; position: sticky; left: 0; min-width: 8rem; max-width: 11rem;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
.control > * { color: var(--soft); font-style: italic; }
.words { white-space: pre-line; min-width: 12rem; overflow-wrap: break-word; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; min-width: 40rem; margin: 0 auto; }
figure .wide { background: #fff; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
.short { background: var(--band); border-radius: .3rem; padding: .75rem 1rem; gap: .4rem 1rem; }
.short dt { color: var(--ink); font-weight: 600; }
@media (max-width: 30rem) { dl, .short { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
.first > * { border-top: 2px solid var(--soft); }
"""


def render(report: Report, pictures: Sequence[Picture]) -> str:
    """The whole page, the pictures inside it."""
    parts = [_pairs(short(report), "short")] if short(report) else []
    parts += _section(pictures[0].title, _figure(pictures[0])) if pictures else []
    for name, rows in table.tables(report).items():
        parts += _section(name, _table(name, rows))
    for picture in pictures[1:]:
        parts += _section(picture.title, _figure(picture))
    parts += _section("In words", "\n".join(f"<p>{_led(paragraph)}</p>" for paragraph in summary(report)))
    parts += _section(table.ARMS, _table(table.ARMS, table.arm_rows(report)))
    parts += _section("How it was measured", _pairs(table.details(report), "details"))
    title = escape(f"Attention swaps in {plain(report['model']['name'])}")
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(parts))


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", content]


def _pairs(pairs: Sequence[tuple[str, str]], name: str) -> str:
    lines = [f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs]
    return "\n".join([f'<dl class="{name}">', *lines, "</dl>"])


def _led(paragraph: str) -> str:
    """The paragraph, the word before its colon in bold."""
    return re.sub(r"^([A-Z][a-z]+(?: [a-z]+)?):", r"<strong>\1:</strong>", escape(paragraph))


def _wide(name: str, content: str) -> str:
    """A box that scrolls sideways by itself, by touch and by keyboard, so that the page does not."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">\n{content}\n</div>'


def _table(name: str, rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    arm = header.index("arm")
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = [f"<thead><tr>{titles}</tr></thead>", "<tbody>"]
    for above, row in zip([None, *body], body, strict=False):
        cells = []
        for index, cell in enumerate(row):
            words = ' class="words"' if header[index] in table.WORDS and len(cell) > 20 else ""
            tag = 'th scope="row"' if index == arm else f"td{words}"
            shown = escape(table.two_lines(cell))
            if index == arm:
                shown = re.sub(r"([:,+])", r"\1<wbr>", shown)  # where a long label may break
            cells.append(f"<{tag}>{shown}</{tag[:2]}>")
        marks = ["control"] if row[arm].endswith("(control)") else []
        marks += ["first"] if arm and above and above[0] != row[0] else []  # of another length
        lines.append(f'<tr class="{" ".join(marks)}">{"".join(cells)}</tr>' if marks else f"<tr>{''.join(cells)}</tr>")
    return _wide(name, "\n".join(["<table>", *lines, "</tbody>", "</table>"]))


def _figure(picture: Picture) -> str:
    data = b64encode(picture.svg).decode("ascii")
    caption = escape(picture.caption)
    image = f'<img alt="{escape(picture.title)}: {caption}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>\n{_wide(picture.title, image)}\n<figcaption>{caption}</figcaption>\n</figure>"
