"""From the JSON of `attnswap tradeoff`, and from nothing else, to tables, plots and pages."""

from pathlib import Path

from ..sources.files import write_whole
from .schema import read, validate, write
from .table import show

__all__ = ["read", "show", "validate", "write", "write_all"]


def write_all(report: dict, folder: str | Path) -> list[Path]:
    """Write report.json, report.md, report.html, and as PNG and SVG the plots for which there is something.

    Return their paths. Everything is rendered before the first file is written, and each file appears whole.
    A plot that an earlier report left in `folder` is removed where this one has none.
    """
    # Here, not above: importing matplotlib takes most of a second that the terminal table does not need.
    from . import html, markdown, plots

    validate(report)
    pictures = plots.pictures(report)
    pages = {
        "report.md": markdown.render(report, pictures).encode(),
        "report.html": html.render(report, pictures).encode(),
    }
    for picture in pictures:
        pages |= {f"{picture.name}.png": picture.png, f"{picture.name}.svg": picture.svg}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [write(report, folder / "report.json")]
    written += [write_whole(folder / name, data) for name, data in pages.items()]
    for name in {f"{plot}.{kind}" for plot in plots.NAMES for kind in ("png", "svg")} - set(pages):
        (folder / name).unlink(missing_ok=True)
    return written
