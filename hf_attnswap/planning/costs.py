"""What a plan costs beside softmax: bytes of the cache from shapes, and the time of a prefill from measured layers.

Both are linear in what is kept, so that every plan has a cost before it is built.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attentions import Heads
from ..attentions import get as attention_named
from ..attentions.groups import Groups as PartedLayer
from ..benchmark.attention import Sdpa, Variant, forward, random_inputs
from ..benchmark.generation import filled_cache
from ..benchmark.measure import interleaved, seconds
from ..errors import UsageError
from ..integration.cache import cache_nbytes
from ..integration.objectives import objective
from ..integration.swapping import restore, swap
from .groups import Groups, Layer


def require_cache(model: PreTrainedModel, groups: Groups) -> None:
    """Raise UsageError where a model keeps no cache of the text that it attends to."""
    if objective(model) != "next tokens" or "causal" not in groups.kinds:
        raise UsageError(f"{type(model).__name__} keeps no cache of its text, so there is no budget of cache")


def require_prefill(model: PreTrainedModel) -> None:
    """Raise UsageError where a model reads more than one text, so that there is no one prompt to time."""
    if objective(model) == "another text":
        raise UsageError(f"{type(model).__name__} reads two texts, so there is no budget of prefill")


def cache_bytes(model: PreTrainedModel, groups: Groups, length: int) -> dict[str, int]:
    """Return the bytes of the cache after `length` tokens, with softmax everywhere and with nothing kept, as measured.

    Args:
        model: not swapped.
    """
    with_softmax = cache_nbytes(filled_cache(model, length))
    swap(model, groups.config(()))
    try:
        return {"softmax": with_softmax, "swapped": cache_nbytes(filled_cache(model, length))}
    finally:
        restore(model)


def cache_share(groups: Groups, kept: Sequence[int], found: Mapping[str, int]) -> float:
    """Return the bytes of the cache of a plan over those of softmax.

    Args:
        kept: places of the groups that keep softmax.
        found: what `cache_bytes` returned.
    """
    sizes = [0.0] * len(groups)
    for layer in groups.layers:
        for place in layer.places:
            sizes[place] += layer.heads.head_dim + layer.heads.value_dim
    share = sum(sizes[place] for place in kept) / sum(sizes)
    return (found["swapped"] + share * (found["softmax"] - found["swapped"])) / found["softmax"]


@torch.no_grad()
def prefill_seconds(
    model: PreTrainedModel, groups: Groups, length: int, rounds: int = 2, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Return the seconds of a forward pass of `length` tokens, as JSON: of the model, and of each form of its layers.

    Layers of one shape take equally long. Between one kept group and all but one, the time goes by a straight line.

    Returns:
        `model`, with softmax everywhere; and `layers`, by shape, a list of seconds by the number of kept groups.
    """
    tokens = torch.arange(length, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    say(f"speed of softmax at {length} tokens")
    took = [seconds(lambda: _read(model, tokens), model.device) for _ in range(rounds)]
    by_shape: dict[str, list[float]] = {}
    for layer in groups.layers:
        if _shape(layer) not in by_shape:
            say(f"speed of a layer at {length} tokens")
            by_shape[_shape(layer)] = _layer_seconds(layer.heads, groups, model, length, rounds)
    return {"model": min(took), "layers": by_shape}


def prefill_speed(groups: Groups, kept: Sequence[int], found: Mapping[str, Any]) -> float:
    """Return how many times as fast as softmax a plan reads a prompt, by the times of layers.

    Args:
        kept: places of the groups that keep softmax.
        found: what `prefill_seconds` returned.
    """
    whole, here = set(kept), found["model"]
    for layer in groups.layers:
        times = found["layers"][_shape(layer)]
        here += times[len(whole.intersection(layer.places))] - times[-1]
    return found["model"] / here if here > 0 else math.inf


@torch.no_grad()
def measured_speed(model: PreTrainedModel, groups: Groups, kept: Sequence[int], length: int, rounds: int = 2) -> float:
    """Return how many times as fast as softmax a plan reads a prompt, measured: softmax and the plan take turns.

    Args:
        model: not swapped; it is swapped and restored for every round.
    """
    tokens = torch.arange(length, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    took: dict[str, list[float]] = {"softmax": [], "plan": []}
    for _ in range(rounds):
        took["softmax"].append(seconds(lambda: _read(model, tokens), model.device))
        swap(model, groups.config(kept))
        try:
            took["plan"].append(seconds(lambda: _read(model, tokens), model.device))
        finally:
            restore(model)
    return min(took["softmax"]) / min(took["plan"])


def _read(model: PreTrainedModel, tokens: Tensor) -> None:
    writes = objective(model) == "next tokens"
    model(input_ids=tokens, **({"use_cache": False, "logits_to_keep": 1} if writes else {}))


def _shape(layer: Layer) -> str:
    h = layer.heads
    return f"{h.num_attention_heads}/{h.num_key_value_heads} heads of {h.head_dim} and {h.value_dim}"


def _layer_seconds(heads: Heads, groups: Groups, model: PreTrainedModel, length: int, rounds: int) -> list[float]:
    """Return the seconds of a layer by the number of groups that it keeps, from none to all."""
    total, causal = heads.num_key_value_heads, "causal" in groups.kinds
    inputs = random_inputs(heads, length, dtype=model.dtype, device=model.device)
    cls = attention_named(groups.attention)
    options = cls.check_options(groups.options)

    def form(kept: int) -> Callable[[], None]:
        if kept == total:
            candidate: Any = Sdpa(causal)
        else:
            planned = {group: (cls, options) for group in range(kept, total)}
            attention = PartedLayer(heads, planned) if kept else cls(heads, **options)
            candidate = Variant(attention.to(device=model.device, dtype=model.dtype), causal)
        return lambda: forward(candidate, inputs)

    measured = sorted({0, 1, total - 1, total})
    times = interleaved({str(kept): form(kept) for kept in measured}, rounds, model.device)
    best = {kept: min(times[str(kept)]) for kept in measured}
    slope = (best[total - 1] - best[1]) / max(1, total - 2) if total > 1 else 0.0
    return [best.get(kept, best[min(1, total)] + slope * (kept - 1)) for kept in range(total + 1)]
