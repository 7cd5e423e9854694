"""Measure the distribution of attention weights by layer and head, beside softmax on the same query and key.

Softmax gives the output of every layer during the measurement, so each layer sees the query and key that the model was
trained for, and no layer suffers from the errors of another. The weights take O(n^2) memory per layer: use samples of
some hundred tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attentions import Attention
from ..integration.objectives import input_device
from ..integration.observing import SOFTMAX, allowed_keys, answering, brought_in
from ..integration.swapping import swapped_modules
from ..masks import Mask
from .perplexity import octaves

FACTS = ("row_sum", "row_sum_spread", "negative", "entropy", "effective_keys", "sparsity", "distance")


@dataclass(frozen=True)
class LayerFacts:
    """Hold the facts of the attention weights `w_ij` of one layer, means over the rows i of the sample.

    Tensors are float64 `[H]`, one number per head. Below, `p_ij = w_ij / sum_j |w_ij|`.

    Attributes:
        layer: path of the attention module.
        row_sum, row_sum_spread: mean and standard deviation over rows of `sum_j w_ij`; 1 and 0 for softmax.
        negative: share of the mass `sum_j |w_ij|` that is of negative weights.
        entropy: entropy of `|p_ij|`, nats.
        effective_keys: exponential of the entropy of each row; 0 in a row without any weight.
        sparsity: share of the allowed keys whose `|p_ij|` is below a hundredth of an equal share.
        distance: total variation distance to softmax, `sum_j |p_ij - softmax_ij| / 2`.
        softmax_entropy, softmax_effective_keys, softmax_sparsity: the same for softmax.
        output_scale: root mean square of the output divided by that of softmax's output, over all heads, for ranges of
            positions that double: (first position, last position, scale).
    """

    layer: str
    row_sum: Tensor
    row_sum_spread: Tensor
    negative: Tensor
    entropy: Tensor
    effective_keys: Tensor
    sparsity: Tensor
    distance: Tensor
    softmax_entropy: Tensor
    softmax_effective_keys: Tensor
    softmax_sparsity: Tensor
    output_scale: tuple[tuple[int, int, float], ...]

    def means(self) -> dict[str, float]:
        """Return the mean over heads of each fact that has a number per head, by its name."""
        return {name: getattr(self, name).mean().item() for name in self.__dataclass_fields__ if name not in _OTHER}

    def by_head(self) -> dict[str, list[float]]:
        """Return a list with a number per head of each fact that has one, by its name."""
        return {name: getattr(self, name).tolist() for name in self.__dataclass_fields__ if name not in _OTHER}


_OTHER = ("layer", "output_scale")


@torch.no_grad()
def distribution_facts(model: nn.Module, input_ids: Tensor) -> list[LayerFacts]:
    """Return the facts of the weights of every swapped layer of `model`, in the order of the layers.

    Of a module that several layers share, they are the means over its calls.

    Args:
        input_ids: int64 `[B, n]`. Memory: O(n^2) per layer.

    Raises:
        UsageError: the model is not swapped.
        NotImplementedError: a variant has no attention weights.
    """
    found: dict[str, list[LayerFacts]] = {name: [] for name in swapped_modules(model)}

    def look(name: str, attention: Attention, query, key, value, mask: Mask, scaling: float) -> Tensor:
        teacher = SOFTMAX(query, key, value, mask, scaling)
        with brought_in(attention):
            ours = weight_facts(attention.weights(query, key, mask, scaling), mask)
        soft = SOFTMAX.weights(query, key, mask, scaling)
        theirs = weight_facts(soft, mask)
        share = ours.pop("share")
        rows = theirs["rows"]
        distance = (share - theirs.pop("share")).abs().sum(-1) / 2
        student = attention(query, key, value, mask, scaling)
        found[name].append(
            LayerFacts(
                layer=name,
                **{fact: _over_rows(ours[fact], rows) for fact in FACTS if fact in ours},
                row_sum_spread=_spread(ours["row_sum"], rows),
                distance=_over_rows(distance, rows),
                softmax_entropy=_over_rows(theirs["entropy"], rows),
                softmax_effective_keys=_over_rows(theirs["effective_keys"], rows),
                softmax_sparsity=_over_rows(theirs["sparsity"], rows),
                output_scale=_scale(student, teacher, rows),
            )
        )
        return teacher

    with answering(model, look):
        model(input_ids=input_ids.to(input_device(model)), use_cache=False)
    return [_mean(calls) for calls in found.values() if calls]


def _mean(calls: list[LayerFacts]) -> LayerFacts:
    """Return the mean over the calls of one module, of which there are several where layers share it."""
    means = {
        name: torch.stack([getattr(call, name) for call in calls]).mean(0)
        for name in LayerFacts.__dataclass_fields__
        if name not in _OTHER
    }
    scale = tuple(
        (first, last, sum(call.output_scale[i][2] for call in calls) / len(calls))
        for i, (first, last, _) in enumerate(calls[0].output_scale)
    )
    return LayerFacts(calls[0].layer, **means, output_scale=scale)


def weight_facts(weights: Tensor, mask: Mask) -> dict[str, Tensor]:
    """Return facts of attention weights by row.

    Args:
        weights: `[B, H, T, S]`.
        mask: which keys each row may attend to; weights of other keys are ignored.

    Returns:
        `row_sum`, `negative`, `entropy` (nats), `effective_keys` and `sparsity`, float64 `[B, H, T]` (see
        `LayerFacts`); `share`, float64 `[B, H, T, S]`, the weights divided by the sum of their magnitudes in the row;
        and `rows`, bool `[B, H, T]`, which rows may attend to something.
    """
    allowed = allowed_keys(mask, weights)
    weights = weights.double().masked_fill(~allowed, 0)
    count = allowed.sum(-1)
    magnitude = weights.abs().sum(-1)
    share = weights / magnitude.clamp(min=1e-300)[..., None]
    entropy = torch.special.entr(share.abs()).sum(-1)
    small = (share.abs() < 0.01 / count.clamp(min=1)[..., None]) & allowed
    return {
        "row_sum": weights.sum(-1),
        "negative": share.clamp(max=0).abs().sum(-1),
        "entropy": entropy,
        "effective_keys": entropy.exp() * (magnitude > 0),
        "sparsity": small.sum(-1) / count.clamp(min=1),
        "share": share,
        "rows": count > 0,
    }


def _over_rows(x: Tensor, rows: Tensor) -> Tensor:
    return (x * rows).sum((0, 2)) / rows.sum((0, 2)).clamp(min=1)


def _spread(x: Tensor, rows: Tensor) -> Tensor:
    centred = x - _over_rows(x, rows)[None, :, None]
    return _over_rows(centred.square(), rows).sqrt()


def _scale(student: Tensor, teacher: Tensor, rows: Tensor) -> tuple[tuple[int, int, float], ...]:
    keep = rows[..., None].double()

    def power(x: Tensor, first: int, last: int) -> float:
        return (x.double().square() * keep)[:, :, first - 1 : last].sum().item()

    ranges = octaves(student.shape[2])
    return tuple((a, b, (power(student, a, b) / max(power(teacher, a, b), 1e-300)) ** 0.5) for a, b in ranges)
