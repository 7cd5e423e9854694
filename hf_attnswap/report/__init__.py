"""Turn a measured comparison, and nothing else, into tables, plots and pages. types.py says what a report is."""

from pathlib import Path

from ..sources.files import write_whole
from .files import parse, read, to_json, validate, write
from .screen import show
from .types import Report

__all__ = ["Report", "parse", "read", "show", "to_json", "validate", "write", "write_all"]


def write_all(report: Report, folder: str | Path) -> list[Path]:
    """Write report.json, report.md, report.html, and as PNG and SVG the plots for which there is something to draw.

    Returns the paths of the files. Everything is rendered before the first file is written; each file appears whole.
    A plot that an earlier report left in `folder` is removed where this report has none.
    """
    # Here, not above: importing matplotlib takes most of a second that the answer in the terminal does not need.
    from . import pages, plots

    validate(report)
    pictures = plots.pictures(report)
    files = {
        "report.md": pages.paper(report, pictures).encode(),
        "report.html": pages.html(report, pictures).encode(),
    }
    for picture in pictures:
        files |= {f"{picture.name}.png": picture.png, f"{picture.name}.svg": picture.svg}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [write(report, folder / "report.json")]
    written += [write_whole(folder / name, data) for name, data in files.items()]
    for name in {f"{plot}.{kind}" for plot in plots.NAMES for kind in ("png", "svg")} - set(files):
        (folder / name).unlink(missing_ok=True)
    return written
