"""Hold the command that writes a conversion for programs that run without Python."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, shown

FORMATS = ("onnx",)


def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="a saved conversion, or the output of a training recipe")
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="a new or empty folder")],
    format: Annotated[str, typer.Option("--format", help="onnx")] = "onnx",
) -> None:
    """Write a conversion as an ONNX graph with its tokenizer, for onnxruntime: texts and single tokens, with the state.

    Example: attnswap export converted --format onnx --output_dir converted_onnx
    """
    if format not in FORMATS:
        raise UsageError(f"format is {shown(format)}; expected {' or '.join(FORMATS)}")
    from ..export import onnx
    from ..integration.swapping import describe
    from ..sources.conversions import find
    from ..sources.files import require_empty, whole_folder
    from ..sources.models import load_any

    require_empty(output_dir)
    found = find(folder)
    if not found.swapped:
        raise UsageError(f"{found.folder} is no conversion: its config.json swaps no attention")
    onnx.require_packages()
    model, processor = load_any(str(found.folder), dtype="float32")
    with whole_folder(output_dir) as written:
        program = onnx.export(model, written)
        if processor is not None:
            processor.save_pretrained(written)
        if model.can_generate():
            model.generation_config.save_pretrained(written)
    kept = f", {len(program.remembered)} tensors remembered" if program.remembered else ""
    print(f"{output_dir / onnx.FILE}: {describe(model)}{kept}")
