"""Write the card of a conversion as a folder: README.md, and the files from which the card was written."""

from pathlib import Path

import yaml

from ..report import read as read_report
from ..sources.conversions import find
from ..sources.files import write_whole
from . import benchmarks, card
from .origin import find_origin, read_config


def write_card(
    folder: str | Path,
    repo_id: str,
    report: str | Path,
    output_dir: str | Path | None = None,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    token: str | None = None,
) -> list[Path]:
    """Write README.md, report.json, recipe.yaml (where the report holds the training), .eval_results/ and config.json.

    Returns the paths of the files. .eval_results/ has registered benchmarks, where the report measured any; config.json
    is copied only where `output_dir` is not the conversion.

    Args:
        folder: the conversion, as `save_pretrained` or a training recipe left it.
        repo_id: where the conversion will stand on the Hub.
        report: the report.json that measured the conversion.
        output_dir: where the files go; by default into the conversion, from where a push takes them.
        base_model, licence, token: as in `push.prepare`.

    Raises:
        UsageError: no conversion, a conversion that the report did not measure, or an unknown origin.
        ValueError: a damaged report.
    """
    folder = find(folder).folder
    output_dir = folder if output_dir is None else Path(output_dir)
    config, found = read_config(folder), read_report(report)
    base_model, licence = find_origin(config, base_model, licence, token)
    text = card.render(config, repo_id, report=found, base_model=base_model, licence=licence)
    recipe = card.recipe(found, config, base_model)
    written = {"README.md": text.encode(), "report.json": Path(report).read_bytes()}
    if recipe is not None:
        written["recipe.yaml"] = yaml.safe_dump(recipe, sort_keys=False).encode()
    written |= benchmarks.files(found, card.measured_arm(found, card.swapped_groups(config)))
    if output_dir.resolve() != folder.resolve():
        written["config.json"] = (folder / "config.json").read_bytes()
    for name in written:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
    return [write_whole(output_dir / name, data) for name, data in written.items()]
