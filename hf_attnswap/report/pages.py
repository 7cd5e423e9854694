"""Write the pages of a report: report.html and report.md, each from a template and the same content."""

import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from . import tables
from .details import details
from .drawing import Picture
from .short import opening, short
from .summary import summary
from .table import WORDS, markdown, two_lines
from .table import escape as escape_markdown
from .text import plain
from .types import Report

_TEMPLATES = PackageLoader("hf_attnswap.report")
_HTML = Environment(loader=_TEMPLATES, autoescape=True)
_SCRIPT = _TEMPLATES.get_source(_HTML, "sort.js")[0]
_MARKDOWN = Environment(loader=_TEMPLATES, keep_trailing_newline=True)


def html(report: Report, pictures: Sequence[Picture]) -> str:
    """Return the whole page as HTML, the pictures inside it."""
    digest = b64encode(sha256(_SCRIPT.encode()).digest()).decode("ascii")
    return _HTML.get_template("report.html.j2").render(
        words=WORDS,
        on_paper=(tables.QUALITY, tables.METRICS, tables.SPEED),
        script=Markup(_SCRIPT),
        script_hash=f"sha256-{digest}",
        **_content(report, pictures),
    )


def paper(report: Report, pictures: Sequence[Picture]) -> str:
    """Return the whole page in GitHub's Markdown, which refers to `pictures` by the names of their PNG files."""
    return _MARKDOWN.get_template("report.md.j2").render(**_content(report, pictures))


def _content(report: Report, pictures: Sequence[Picture]) -> dict[str, Any]:
    first = [picture for picture in pictures if picture.name in ("plan", "tradeoff")]
    return {
        "title": plain(report.title),
        "opening": opening(report),
        "short": short(report),
        "first": first,
        "pictures": [picture for picture in pictures if picture not in first],
        "tables": tables.tables(report),
        "summary": summary(report),
        "arms": tables.arms(report),
        "details": details(report),
    }


def _breakable(label: str) -> Markup:
    """Return the label, with the places where it may break."""
    return Markup(re.sub(r"([:,+])", r"\1<wbr>", str(escape(label))))


def _led(paragraph: str) -> Markup:
    """Return the paragraph, the word before its colon in bold."""
    return Markup(re.sub(r"^([A-Z][a-z]+(?: [a-z]+)?):", r"<strong>\1:</strong>", str(escape(paragraph))))


_HTML.filters |= {"two_lines": two_lines, "breakable": _breakable, "led": _led}
_HTML.filters |= {"base64": lambda data: b64encode(data).decode("ascii")}
_MARKDOWN.filters |= {"md": escape_markdown, "markdown": markdown}
