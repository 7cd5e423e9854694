"""Hold the command that shows what each swapped layer does to gradients, to the distribution, and to the output."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import (
    DatasetConfig,
    DatasetName,
    Device,
    Dtype,
    Json,
    Layers,
    Model,
    TextColumn,
    TrustRemoteCode,
    show,
    status,
    table_of,
    text_source,
)

# Two tables, because a terminal is 80 characters wide.
DAMAGE = {
    "layer": "layer", "KL": "kl", "ppl_ratio": "perplexity_ratio", "grad_q": "gradient_query", "grad_k": "gradient_key",
    "grad_v": "gradient_value", "grad_in": "gradient_layer_input", "dead": "dead",
}  # fmt: skip
DISTRIBUTION = {
    "layer": "layer", "saturated": "saturated", "row_sum": "row_sum", "negative": "negative",
    "sparse": "sparsity", "distance": "distance", "keys": "effective_keys", "scale": "output_scale",
}  # fmt: skip


def diagnose(
    model: Model,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            "--attention",
            help="a variant, options after a colon: relu_power:p=8; may be repeated; "
            "none for a model that is swapped already",
        ),
    ] = None,
    layers: Layers = None,
    validation_file: Annotated[str | None, typer.Option("--validation_file", help="text, json, parquet or csv")] = None,
    dataset_name: DatasetName = None,
    dataset_config_name: DatasetConfig = None,
    split: Annotated[str, typer.Option("--split", help="of the dataset")] = "test",
    text_column: TextColumn = "text",
    context_length: Annotated[int, typer.Option("--context_length", min=2, help="tokens of a text")] = 256,
    texts: Annotated[int, typer.Option("--texts", min=1, help="for the damage of each layer")] = 2,
    output_file: Annotated[Path | None, typer.Option("--output_file", help="everything, by head too, as JSON")] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """By layer: gradient flow, what becomes of the distribution, and what the layer costs when it alone is swapped.

    Gradients (of q, k, v and the layer's input), effective keys and output scale are over softmax's on the same text.
    One forward pass per layer and text. Below the tables: the layers by damage, and half of them for --layers.

    Example: attnswap diagnose HuggingFaceTB/SmolLM2-135M-Instruct --attention relu --validation_file book.txt
    """
    from ..config import layers_of
    from ..evaluation.damage import least_damaged
    from ..evaluation.diagnose import diagnose as look
    from ..evaluation.diagnose import summary_rows
    from ..evaluation.tasks import quality_task
    from ..integration.objectives import require_positions
    from ..integration.swapping import restore, swap, swapped_modules
    from ..sources.files import require_file, write_whole
    from ..sources.models import load
    from ..sources.texts import token_blocks
    from ..tradeoff import Arm

    if output_file is not None:
        require_file(output_file)
    arms = [Arm.parse(text) for text in attention or []]
    source = text_source(validation_file, dataset_name, dataset_config_name, split, text_column)
    loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    task = quality_task(loaded)  # which says what to use for models of something else than one text
    if bool(swapped_modules(loaded)) == bool(arms):
        raise UsageError(
            f"{model!r} is already swapped: leave out --attention" if arms else "name what to look at: --attention"
        )
    require_positions(loaded, context_length, "--context_length")
    blocks = token_blocks(source, tokenizer, context_length, context_length * texts, closed=task is not None)
    mask = getattr(tokenizer, "mask_token_id", None)
    found, tables = [], []
    with status("looking") as say:
        for arm in arms or [None]:
            if arm is not None:
                swap(loaded, arm.swap if layers is None else replace(arm.swap, layers=layers_of(layers)))
            looked = look(loaded, blocks, say, mask) | {"label": arm.label if arm else model}
            if arm is not None:
                restore(loaded)
            found.append(looked)
            title = f"{looked['label']}: {looked['attention']}, {looked['tokens']} tokens, softmax's perplexity "
            rows = summary_rows(looked)
            tables.append(table_of(f"{title}{looked['perplexity']:.4g}", rows, **DAMAGE))
            tables.append(table_of(f"{looked['label']}: what is lost as a distribution", rows, **DISTRIBUTION))
            order = looked["layers_by_damage"]
            half = ",".join(map(str, least_damaged(looked, (len(order) + 1) // 2)))
            tables.append(f"Least damage (KL) first: {', '.join(map(str, order))}\nHalf of them: --layers {half}\n")
    if output_file is not None:
        write_whole(output_file, json.dumps({"model": model, "text": source.name, "arms": found}, indent=1).encode())
    show(as_json, found, *tables)
