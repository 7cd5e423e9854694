"""What each swapped layer costs by itself: one forward pass per layer, all others running softmax."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..integration.observing import answering, own, softmax
from ..integration.swapping import swapped_modules


@dataclass(frozen=True)
class LayerDamage:
    """One layer swapped, the others not. The reference has `layer` None, and no divergence.

    Attributes:
        kl: mean over tokens of KL(original || with this layer swapped) of the next token, nats; kl_error its standard
            error, from the spread between texts (NaN for one text).
        nll: mean negative log-likelihood of the text. perplexity: its exponential.
    """

    layer: str | None
    kl: float
    kl_error: float
    nll: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700))


@torch.no_grad()
def layer_damage(
    model: nn.Module, blocks: Tensor, progress: Callable[[str], None] = lambda line: None
) -> list[LayerDamage]:
    """The damage of every swapped layer of a language model, the reference (softmax in all of them) first.

    Args:
        blocks: texts `[N, n]`, int64; cost: N (layers + 1) forward passes of n tokens.

    Raises:
        UsageError: the model is not swapped.
    """
    layers = list(swapped_modules(model))
    device = next(model.parameters()).device
    kl = torch.zeros(len(layers), len(blocks), dtype=torch.float64)
    nll = torch.zeros(len(layers) + 1, len(blocks), dtype=torch.float64)
    chosen: str | None = None

    def answer(name, *arguments):
        return (own if name == chosen else softmax)(name, *arguments)

    with answering(model, answer):
        for text, block in enumerate(blocks.to(device)):

            def log_probabilities(block: Tensor = block) -> Tensor:
                return model(input_ids=block[None], use_cache=False).logits[0].float().log_softmax(-1)

            chosen = None
            original = log_probabilities()
            nll[0, text] = nn.functional.nll_loss(original[:-1], block[1:]).item()
            for index, chosen in enumerate(layers):  # noqa: B007 (`answer` reads it)
                progress(f"damage of layer {index + 1} of {len(layers)}, text {text + 1} of {len(blocks)}")
                found = log_probabilities()
                kl[index, text] = (
                    nn.functional.kl_div(found, original, reduction="none", log_target=True).sum(-1).mean()
                )
                nll[index + 1, text] = nn.functional.nll_loss(found[:-1], block[1:]).item()
    error = kl.std(1) / math.sqrt(len(blocks)) if len(blocks) > 1 else torch.full((len(layers),), math.nan)
    means, likelihoods = kl.mean(1).tolist(), nll.mean(1).tolist()
    rows = zip(layers, means, error.tolist(), likelihoods[1:], strict=True)
    return [LayerDamage(None, 0.0, 0.0, likelihoods[0]), *(LayerDamage(*row) for row in rows)]


def by_damage(rows: list[dict[str, Any]]) -> list[int]:
    """The numbers of the layers, least damage (`kl`) first; what is not finite comes last.

    Layers are numbered as `swap(layers=...)` counts them. Where several modules have one number (encoder and decoder),
    the worst of them counts, since they are swapped together.
    """
    worst: dict[int, float] = {}
    for row in rows:
        kl = math.inf if row["kl"] is None or math.isnan(row["kl"]) else row["kl"]
        worst[row["index"]] = max(kl, worst.get(row["index"], kl))
    return sorted(worst, key=lambda index: (worst[index], index))


def least_damaged(diagnosis: Mapping[str, Any], count: int) -> list[int]:
    """The `count` layers that cost least when they alone are swapped, ascending, for `swap(layers=...)`.

    They were measured one at a time: what they cost together is not the sum, and wants measuring.

    Args:
        diagnosis: what `diagnose` returns; an entry of `arms` in the file of `attnswap diagnose --output_file`; or
            `diagnostics` of an arm in report.json.

    Raises:
        UsageError: fewer layers, or a diagnosis of an earlier release without `layers_by_damage`.
    """
    order = diagnosis.get("layers_by_damage")
    if order is None:
        raise UsageError("the diagnosis has no layers_by_damage: make it again with this release")
    if not 1 <= count <= len(order):
        raise UsageError(f"count is {count}; expected 1 to {len(order)}, the layers of the diagnosis")
    return sorted(order[:count])
