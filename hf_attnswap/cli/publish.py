"""Hold the commands for others: push a conversion to the Hub, and let other programs load conversions."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import UsageError
from .options import Json, show

BaseModel = Annotated[str | None, typer.Option("--base_model", help="Hub id of the model that was converted, or none")]
Licence = Annotated[str | None, typer.Option("--license", help="where its card does not say it")]


def card(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="a saved conversion, or the output of a training recipe")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="the repository where it will stand")],
    report: Annotated[
        Path, typer.Option("--report", help="report.json of `attnswap tradeoff` or a comparison of classifiers")
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="of the card; into the conversion by default, for push")
    ] = None,
    base_model: BaseModel = None,
    licence: Licence = None,
    as_json: Json = False,
) -> None:
    """Write the model card of a measured conversion: README.md, beside report.json, recipe.yaml and config.json.

    Example: attnswap card converted user/smollm2-hedgehog --report report/report.json --output_dir model_cards/hedgehog
    """
    from ..publish.folder import write_card

    written = write_card(folder, repo_id, report, output_dir, base_model=base_model, licence=licence)
    show(as_json, list(map(str, written)), "\n".join(map(str, written)))


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="a saved conversion, or the output of a training recipe")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="the repository, made where there is none")],
    private: Annotated[bool, typer.Option("--private", help="a new repository that only you see")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="a branch, made where there is none")] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="a pull request in place of a commit")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="list what would go, and stop")] = False,
    base_model: BaseModel = None,
    licence: Licence = None,
    as_json: Json = False,
) -> None:
    """Push a conversion to the Hub, with a card written from its config.json and report.json. Repeat it to continue.

    Example: attnswap push converted user/smollm2-hedgehog --private --dry_run
    """
    from huggingface_hub import get_token

    from ..publish import push as publish

    operations = publish.prepare(folder, repo_id, base_model=base_model, licence=licence)
    files = {operation.path_in_repo: operation.upload_info.size for operation in operations}
    left = publish.not_sent(folder, operations)
    said = [f"left out, as no part of a conversion: {', '.join(left)}"] if left else []
    table = Table(title=f"to {repo_id}" + (f", revision {revision}" if revision else ""))
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for name, size in files.items():
        table.add_row(name, f"{size:,}")
    url = None
    if not dry_run:
        url = publish.push(operations, repo_id, private=private or None, revision=revision, create_pr=create_pr)
    elif get_token() is None:
        said.append("to push it, a Hub token is missing: run `hf auth login`, or set HF_TOKEN")
    said += [url] if url else []
    show(as_json, {"repo_id": repo_id, "files": files, "left_out": left, "url": url}, table, *said)


def run(
    context: typer.Context,
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="such as lm_eval, transformers, accelerate")],
) -> None:
    """Run another Python program with hf_attnswap imported, so that it loads conversions as any other model.

    Example: attnswap run lm_eval --model hf --model_args pretrained=converted --tasks hellaswag
    """
    from importlib.metadata import entry_points

    found = next(iter(entry_points(group="console_scripts", name=program)), None)
    if found is None:
        raise UsageError(f"no installed package has a program {program!r}")
    sys.argv = [program, *context.args]
    sys.exit(found.load()())
