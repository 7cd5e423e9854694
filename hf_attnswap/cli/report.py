"""The command that reads reports again: one is drawn anew, several are compared."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import Json, show


def report(
    files: Annotated[list[Path], typer.Argument(metavar="REPORT.json ...", help="what `attnswap tradeoff` wrote")],
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="of a single report: write its pages and plots there")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a report again, or compare several of the same text: which machine each comes from is said below.

    Example: attnswap report before/report.json after/report.json
    """
    from .. import report as reports
    from ..report import compare

    if output_dir and len(files) > 1:
        raise UsageError("--output_dir is for the pages of a single report")
    try:
        found = {str(file): reports.read(file) for file in files}
        if len(found) == 1:
            (content,) = found.values()
            shown = reports.show(content)
        else:
            header, *body = compare.rows(found)
            content = [dict(zip(header, row, strict=True)) for row in body]
            shown = compare.show_all(found)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    if output_dir:
        print("\n".join(map(str, reports.write_all(content, output_dir))), file=sys.stderr)
    show(as_json, content, shown)
