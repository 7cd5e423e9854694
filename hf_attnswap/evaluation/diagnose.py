"""Collect the gradients, the weight distributions and the damage of each layer of a swapped model as plain data."""

import math
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..integration.finding import inspect
from ..integration.swapping import describe
from .damage import by_damage, layer_damage
from .distribution import distribution_facts
from .gradients import LayerGradients, gradient_flow
from .predictions import predicted


def diagnose(
    model: PreTrainedModel,
    blocks: Tensor,
    progress: Callable[[str], None] = lambda line: None,
    mask_token_id: int | None = None,
) -> dict[str, Any]:
    """Return what the swapped layers of a language model do, each beside the softmax that the layer replaces.

    Gradients and distributions are measured on the first text, the damage of each layer on all texts. A masked model
    reads the texts with 15 % of their tokens masked, and predicts these.

    Args:
        blocks: texts, int64 `[N, n]`.
        progress: called with a line of text for each part of the work.
        mask_token_id: what stands for a masked token, for masked models.

    Returns:
        A dict of JSON values, None where a number is not finite:

        - `attention`, `context` (n) and `tokens` (N n)
        - `perplexity`: of the model with softmax in all layers, over what it predicts
        - `gradient_at_first_layer`: norm of the gradient at the input of the first swapped layer, divided by the norm
          with softmax; gradients vanish far below 1 and explode far above 1
        - `layers`: one dict per swapped layer
        - `layers_by_damage`: the numbers of the layers, least damage first (see `damage.least_damaged`)

    Raises:
        UsageError: the model is not swapped, or predicts no tokens.
        NotImplementedError: a variant has no attention weights.
    """
    blocks, labels = predicted(model, blocks, mask_token_id)
    first = None if labels is None else labels[:1]
    progress("gradients")
    ours, control = (gradient_flow(model, blocks[:1], with_softmax, first) for with_softmax in (False, True))
    progress("distributions")
    facts = distribution_facts(model, blocks[:1])
    reference, *damage = layer_damage(model, blocks, progress, labels)
    index = {module.name: module.layer for module in inspect(model)}
    layers = [
        {
            "layer": row.layer,
            "index": index[row.layer],
            "kl": row.kl,
            "kl_error": row.kl_error,
            "perplexity_ratio": math.exp(min(row.nll - reference.nll, 700)),
            "gradient": _norms(mine),
            "gradient_of_softmax": _norms(other),
            "dead": mine.dead,
            "saturated": mine.saturated,
            "saturated_of_softmax": other.saturated,
            **fact.means(),
            "output_scale": [{"first": a, "last": b, "scale": scale} for a, b, scale in fact.output_scale],
            "by_head": fact.by_head(),
        }
        for row, mine, other, fact in zip(damage, ours, control, facts, strict=True)
    ]
    return _finite(
        {
            "attention": describe(model),
            "context": blocks.shape[1],
            "tokens": blocks.numel(),
            "perplexity": reference.perplexity,
            "gradient_at_first_layer": _over(layers[0], "layer_input"),
            "layers_by_damage": by_damage(layers),
            "layers": layers,
        }
    )


def _finite(value: Any) -> Any:
    """Return `value` with None in place of each number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _norms(found: LayerGradients) -> dict[str, float | None]:
    return {part: getattr(found, part) for part in ("query", "key", "value", "layer_input")}


def _over(row: dict[str, Any], part: str) -> float | None:
    """Return the gradient of `part` divided by that of softmax; None where there is none or softmax's is 0."""
    control = row["gradient_of_softmax"][part]
    ours = row["gradient"][part]
    return ours / control if control and ours is not None else None


def summary_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row of numbers per layer of a diagnosis, for a table.

    Gradients and effective keys are divided by those of softmax; `output_scale` is that of the last range of positions.

    Args:
        found: what `diagnose` returns.
    """
    return [
        {
            "layer": ".".join(re.findall(r"\d+", row["layer"])) or row["layer"],
            "kl": row["kl"],
            "perplexity_ratio": row["perplexity_ratio"],
            **{f"gradient_{part}": _over(row, part) for part in row["gradient"]},
            **{name: row[name] for name in ("dead", "saturated", "row_sum", "negative", "sparsity", "distance")},
            "effective_keys": row["effective_keys"] and row["effective_keys"] / row["softmax_effective_keys"],
            "output_scale": row["output_scale"][-1]["scale"],
        }
        for row in found["layers"]
    ]
