"""Measure whether a swap makes gradients vanish or explode: their norms by layer, beside softmax on the same batch."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attentions import Attention, ScoreAttention
from ..integration.objectives import input_device
from ..integration.observing import SOFTMAX, Answer, allowed_keys, answering, own, softmax
from ..integration.swapping import swapped_modules
from ..masks import Mask
from ..ops.scores.reference import score_weights
from ..ops.spec import Activation
from .predictions import NOTHING, next_token_labels

FLAT = 0.01  # a weight that changes by less than this part of itself per unit of its score is saturated


@dataclass(frozen=True)
class LayerGradients:
    """Hold the gradients of one layer and the shares of attention weights through which little or no gradient flows.

    Attributes:
        layer: path of the attention module; where layers share it, the rest is over all of its calls.
        query, key, value: norm of the gradient of the loss with respect to each input of the attention.
        layer_input: norm of the gradient with respect to the input of the model's block that holds the attention; None
            where the attention is in no block.
        dead: share of the allowed weights that are exactly 0, through which neither a gradient nor a value flows.
        saturated: share of the allowed weights that are not 0 with `|d log w_ij / d s_ij| < 0.01`, where w_ij includes
            the division by the row sum if the variant has one; None for variants that do not act on scores s_ij.
    """

    layer: str
    query: float
    key: float
    value: float
    layer_input: float | None
    dead: float
    saturated: float | None


def gradient_flow(
    model: nn.Module, input_ids: Tensor, with_softmax: bool = False, labels: Tensor | None = None
) -> list[LayerGradients]:
    """Return the gradients of every swapped layer in one backward pass of the language-modelling loss, in layer order.

    Cost: one forward and one backward pass, and O(n^2) memory per layer for the weights.

    Args:
        input_ids: int64 `[B, n]`.
        with_softmax: run softmax in the swapped layers, for comparison.
        labels: what is predicted at each place, int64 `[B, n]`; the next tokens by default.

    Raises:
        UsageError: the model is not swapped.
        NotImplementedError: a variant has no attention weights.
    """
    norms: dict[str, dict[str, float]] = {name: {} for name in swapped_modules(model)}
    shares: dict[str, list[tuple[float, float | None]]] = {name: [] for name in norms}
    answer: Answer = softmax if with_softmax else own

    def look(name, attention, query, key, value, mask, scaling):
        query, key, value = (t.view_as(t) for t in (query, key, value))  # so that the hooks see this call alone
        for part, tensor in (("query", query), ("key", key), ("value", value)):
            tensor.register_hook(_into(norms[name], part))
        shares[name].append(
            dead_and_saturated(SOFTMAX if with_softmax else attention, query.detach(), key.detach(), mask, scaling)
        )
        return answer(name, attention, query, key, value, mask, scaling)

    with answering(model, look), _layer_inputs(model, norms), _frozen(model), torch.enable_grad():
        embedded = model.get_input_embeddings()(input_ids.to(input_device(model)))
        embedded = embedded.detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        labels = next_token_labels(input_ids) if labels is None else labels
        nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten().to(logits.device), ignore_index=NOTHING
        ).backward()
    return [
        LayerGradients(
            name,
            *(found.get(part, 0.0) for part in ("query", "key", "value")),
            found.get("layer_input"),
            *(None if None in share else sum(share) / len(share) for share in zip(*shares[name], strict=True)),
        )
        for name, found in norms.items()
    ]


@torch.no_grad()
def dead_and_saturated(
    attention: Attention, query: Tensor, key: Tensor, mask: Mask, scaling: float
) -> tuple[float, float | None]:
    """Return `LayerGradients.dead` and `LayerGradients.saturated` of one call of `attention`.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, Hkv, S, D]`.
        mask: which keys each row may attend to.
        scaling: factor of the scores.
    """
    flatness: list[Tensor] = []
    if isinstance(attention, ScoreAttention):
        weights = score_weights(query, key, mask, scaling, _watched(attention.activation(), flatness))
    else:
        weights = attention.weights(query, key, mask, scaling)
    allowed = allowed_keys(mask, weights)
    alive = allowed & (weights != 0)
    dead = 1 - alive.sum().item() / max(1, allowed.sum().item())
    if not flatness:
        return dead, None
    flat = flatness[0][..., : weights.shape[-1]].expand_as(weights) < FLAT
    return dead, (flat & alive).sum().item() / max(1, alive.sum().item())


def _watched(activation: Activation, flatness: list[Tensor]) -> Activation:
    """Return the activation of a variant, which also appends `|d log w_ij / d s_ij|` to `flatness` at each call."""

    def watched(scores: Tensor, count: Tensor, peak: Tensor | None, **given) -> Tensor:
        with torch.enable_grad():
            own_scores = scores.detach().clone().requires_grad_()
            terms = activation.f(own_scores.clone(), count, peak, **given)
            (slope,) = torch.autograd.grad(terms.sum(), own_scores)
        terms = terms.detach()
        change = slope / terms
        if activation.needs_total:
            change = change - slope / terms.sum(-1, keepdim=True)
        flatness.append((change * activation.factor_for(scores)).abs())
        return activation.f(scores, count, peak, **given)

    return replace(activation, f=watched)


def _into(found: dict[str, float], part: str) -> Callable[[Tensor], None]:
    def note(gradient: Tensor) -> None:
        found[part] = math.hypot(found.get(part, 0.0), gradient.double().norm().item())

    return note


@contextmanager
def _layer_inputs(model: nn.Module, norms: dict[str, dict[str, float]]) -> Iterator[None]:
    """Record the gradient norms of the inputs of the blocks that hold the modules, under "layer_input" in `norms`.

    A block is a member of a list of layers: the last part of its path is a number.
    """
    hooks = []
    for name, found in norms.items():
        block = name
        while block and not block.rpartition(".")[2].isdigit():
            block = block.rpartition(".")[0]
        if not block:
            continue

        def look(module, arguments, keywords, found=found):
            entered = next(
                (x for x in (*arguments, *keywords.values()) if torch.is_tensor(x) and x.requires_grad), None
            )
            if entered is not None:
                entered.register_hook(_into(found, "layer_input"))

        hooks.append(model.get_submodule(block).register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of the parameters, which would double the cost, while the context is open."""
    training = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in training:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
