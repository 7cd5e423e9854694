"""Measure what each swapped layer costs alone: one forward pass per layer, while all other layers run softmax."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..integration.objectives import input_device
from ..integration.observing import answering, own, softmax
from ..integration.swapping import swapped_modules
from .predictions import NOTHING, next_token_labels


@dataclass(frozen=True)
class LayerDamage:
    """Hold what the model loses where one layer runs its variant and all others run softmax.

    Attributes:
        layer: path of the attention module; None for the reference, which runs softmax in all layers.
        kl: KL(original || model with this layer swapped) of the predicted tokens in nats, the mean over tokens; 0 for
            the reference.
        kl_error: standard error of `kl`, from the spread between texts; NaN for a single text.
        nll: mean negative log-likelihood of the texts, nats per token.
    """

    layer: str | None
    kl: float
    kl_error: float
    nll: float

    @property
    def perplexity(self) -> float:
        """Return the exponential of `nll`, cut off at e^700."""
        return math.exp(min(self.nll, 700))


@torch.no_grad()
def layer_damage(
    model: nn.Module,
    blocks: Tensor,
    progress: Callable[[str], None] = lambda line: None,
    labels: Tensor | None = None,
) -> list[LayerDamage]:
    """Return the damage of every swapped layer of a language model, after the reference with softmax in all of them.

    Cost: `N (layers + 1)` forward passes of n tokens.

    Args:
        blocks: texts, int64 `[N, n]`.
        progress: called with a line of text before each forward pass of a layer.
        labels: what is predicted where, int64 `[N, n]`, `NOTHING` elsewhere; next tokens everywhere by default.

    Raises:
        UsageError: the model is not swapped.
    """
    places = torch.ones_like(blocks, dtype=torch.bool) if labels is None else labels != NOTHING
    labels = next_token_labels(blocks) if labels is None else labels
    layers = list(swapped_modules(model))
    device = input_device(model)
    kl = torch.zeros(len(layers), len(blocks), dtype=torch.float64)
    nll = torch.zeros(len(layers) + 1, len(blocks), dtype=torch.float64)
    chosen: str | None = None

    def answer(name, *arguments):
        return (own if name == chosen else softmax)(name, *arguments)

    with answering(model, answer):
        for text, block in enumerate(blocks.to(device)):

            def log_probabilities(block: Tensor = block, here: Tensor = places[text]) -> Tensor:
                logits = model(input_ids=block[None], use_cache=False).logits[0]
                return logits[here.to(logits.device)].float().log_softmax(-1)

            told = labels[text][places[text]].to(device)
            chosen = None
            original = log_probabilities()
            nll[0, text] = nn.functional.nll_loss(original, told, ignore_index=NOTHING).item()
            for index, chosen in enumerate(layers):  # noqa: B007 (`answer` reads it)
                progress(f"damage of layer {index + 1} of {len(layers)}, text {text + 1} of {len(blocks)}")
                found = log_probabilities()
                kl[index, text] = (
                    nn.functional.kl_div(found, original, reduction="none", log_target=True).sum(-1).mean()
                )
                nll[index + 1, text] = nn.functional.nll_loss(found, told, ignore_index=NOTHING).item()
    error = kl.std(1) / math.sqrt(len(blocks)) if len(blocks) > 1 else torch.full((len(layers),), math.nan)
    means, likelihoods = kl.mean(1).tolist(), nll.mean(1).tolist()
    rows = zip(layers, means, error.tolist(), likelihoods[1:], strict=True)
    return [LayerDamage(None, 0.0, 0.0, likelihoods[0]), *(LayerDamage(*row) for row in rows)]


def by_damage(rows: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the layers in the order of their damage (`kl`), the least first.

    Layers are numbered as `swap(layers=...)` counts them. A layer without a finite `kl` comes last. Where several
    modules have one number (encoder and decoder), the largest damage among these counts, since `swap` swaps them
    together.

    Args:
        rows: one dict per module, with `index`, the number of the layer, and `kl`, nats or None.
    """
    worst: dict[int, float] = {}
    for row in rows:
        kl = math.inf if row["kl"] is None or math.isnan(row["kl"]) else row["kl"]
        worst[row["index"]] = max(kl, worst.get(row["index"], kl))
    return sorted(worst, key=lambda index: (worst[index], index))


def least_damaged(diagnosis: Mapping[str, Any], count: int) -> list[int]:
    """Return the `count` layers with the least damage, in ascending order, for `swap(layers=...)`.

    Each layer was measured alone. The damage of several layers together is not the sum of theirs, so measure the chosen
    layers together.

    Args:
        diagnosis: what `diagnose` returns; an entry of `arms` in the file of `attnswap diagnose --output_file`; or
            `diagnostics` of an arm in report.json.

    Raises:
        UsageError: `count` is not between 1 and the number of layers, or the diagnosis has no `layers_by_damage`.
    """
    order = diagnosis.get("layers_by_damage")
    if order is None:
        raise UsageError("the diagnosis has no layers_by_damage: make it again with this release")
    if not 1 <= count <= len(order):
        raise UsageError(f"count is {count}; expected 1 to {len(order)}, the layers of the diagnosis")
    return sorted(order[:count])
