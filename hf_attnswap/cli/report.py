"""Hold the command that reads reports again: one is drawn anew, several are compared."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import Json, show


def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="REPORT.json ...", help="of any kind: trade-off, classification, quality")
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="of a single report: write its pages and plots there")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a report again, or compare several on the same data: which machine each comes from is said below.

    Example: attnswap report before/report.json after/report.json
    """
    from .. import report as reports
    from ..report import compare

    if output_dir and len(files) > 1:
        raise UsageError("--output_dir is for the pages of a single report")
    read = {str(file): reports.read(file) for file in files}
    if len(read) > 1:
        table = compare.side_by_side(read)
        content = [dict(zip(table.header, row, strict=True)) for row in table.rows]
        show(as_json, content, compare.show_all(read))
        return
    (report,) = read.values()
    if output_dir:
        print("\n".join(map(str, reports.write_all(report, output_dir))), file=sys.stderr)
    page = (output_dir or files[0].parent) / "report.html"
    show(as_json, reports.to_json(report), reports.show(report, page if page.is_file() else None))
