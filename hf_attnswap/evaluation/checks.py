"""Check that a swapped model computes what its variants define, before its numbers are believed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..integration.objectives import input_device, learned_positions, objective
from ..integration.observing import answering, brought_in, softmax
from .likeness import logits_or_hidden

TOKENS, PADDING, STEPS = 48, 5, 6  # of the text, before it in a batch, and written one by one


@dataclass(frozen=True)
class Check:
    """Hold the outcome of one check of a swapped model.

    Attributes:
        name: the name of the check, see `check_swap`.
        worst: the largest absolute difference between the two outputs compared, divided by the standard deviation of
            the expected output; NaN where the check could not be computed.
        limit: the largest `worst` that passes.
        says: what a failure means, with the error message where the check could not be computed.
    """

    name: str
    worst: float
    limit: float
    says: str

    @property
    def passed(self) -> bool:
        """Return whether `worst` is within `limit`; False where `worst` is NaN."""
        return self.worst <= self.limit


@torch.no_grad()
def check_swap(original: nn.Module, swapped: nn.Module, tokens: Tensor) -> list[Check]:
    """Check a swapped model of text against the original and against the definitions of its variants.

    - causal: later tokens change no logits of earlier ones, so the mask reaches the layers
    - padding: a text has the same logits alone and padded in a batch
    - state: decoding token by token with a cache gives the same logits as one pass
    - definition: every layer computes its definition, `Attention.reference`
    - seam: with softmax in the swapped layers, through the same masks and scale, the logits are the original's

    Padding is on the left for models of next tokens, and on the right for models whose attention is bidirectional,
    which have no checks `causal` and `state`. Models without logits are compared by their last hidden states.

    A check that cannot be computed is returned as failed, with the error in `Check.says`.

    Args:
        original: the model before the swap, in eval mode.
        swapped: the same weights, swapped, in eval mode.
        tokens: int64, any shape, read as one stream of at least `TOKENS` tokens; the first `TOKENS` are used.
    """
    room = min(TOKENS, (learned_positions(swapped) or TOKENS + PADDING) - PADDING)
    text = tokens.reshape(-1)[None, :room].to(input_device(swapped))
    limit = 0.1 if next(swapped.parameters()).dtype in (torch.bfloat16, torch.float16) else 2e-3
    writes = objective(swapped) == "next tokens"
    whole = _logits(swapped, text)
    pad = _padding if writes else _padding_behind
    checks: dict[str, tuple[str, Callable[[], float]]] = {
        "causal": ("what comes later changes what stands before it", lambda: _causal(swapped, text, whole)),
        "padding": ("padding changes what a text says", lambda: pad(swapped, text, whole)),
        "state": ("writing token by token differs from reading at once", lambda: _state(swapped, text, whole)),
        "definition": ("a layer does not compute its definition", lambda: _definition(swapped, text)),
        "seam": ("masks or scale do not reach the layers as they should", lambda: _seam(original, swapped, text)),
    }
    if not writes:
        del checks["causal"], checks["state"]
        if whole.dim() < 3 and swapped.config.pad_token_id is None:
            del checks["padding"]  # it would not know which token is the last one of a text
    found = []
    for name, (says, run) in checks.items():
        try:
            worst = run()
        except Exception as error:  # whatever a model raises is a failure of the check
            worst, says = math.nan, f"{says}: {(str(error) or repr(error)).splitlines()[0]}"
        found.append(Check(name, worst, limit, says))
    return found


def _logits(model: nn.Module, text: Tensor, **told) -> Tensor:
    return logits_or_hidden(model(input_ids=text, use_cache=False, **told))


def _worst(ours: Tensor, expected: Tensor) -> float:
    spread = (expected.float().std() if expected.numel() > 1 else expected.float().abs()).clamp(min=1e-12)
    return ((ours.float() - expected.float()).abs().max() / spread).item()


def _causal(model, text, whole) -> float:
    changed = text.clone()
    half = text.shape[1] // 2
    changed[:, half:] = text[:, half:].flip(1).roll(1)
    return _worst(_logits(model, changed)[:, :half], whole[:, :half])


def _padding(model, text, whole) -> float:
    pad = text[:, :1].expand(-1, PADDING)
    batch = torch.cat([torch.cat([pad, text], 1), torch.cat([text[:, :PADDING], text], 1)])
    mask = torch.ones_like(batch)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    told = {"attention_mask": mask, "position_ids": positions}
    return _worst(_logits(model, batch, **told)[0, PADDING:], whole[0])


def _padding_behind(model, text, whole) -> float:
    token = model.config.pad_token_id
    pad = text[:, :1].expand(-1, PADDING) if token is None else torch.full_like(text[:, :PADDING], token)
    batch = torch.cat([torch.cat([text, pad], 1), torch.cat([text, text[:, :PADDING]], 1)])
    mask = torch.ones_like(batch)
    mask[0, -PADDING:] = 0
    padded = _logits(model, batch, attention_mask=mask)[0]
    return _worst(padded[: len(whole[0])] if whole.dim() == 3 else padded, whole[0])


def _state(model, text, whole) -> float:
    cache = DynamicCache(config=model.config)
    start = text.shape[1] - STEPS
    parts = [model(input_ids=text[:, :start], past_key_values=cache, use_cache=True).logits[:, -1:]]
    for at in range(start, text.shape[1] - 1):
        parts.append(model(input_ids=text[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return _worst(torch.cat(parts, 1), whole[:, start - 1 : -1])


def _definition(model, text) -> float:
    found = []

    def look(name, attention, query, key, value, mask, scaling):
        with brought_in(attention):
            expected = attention.reference(query, key, value, mask, scaling)
        found.append(_worst(attention(query, key, value, mask, scaling), expected) if expected.any() else 0.0)
        return softmax(name, attention, query, key, value, mask, scaling)

    with answering(model, look):
        _logits(model, text)
    return max(found)


def _seam(original, swapped, text) -> float:
    with answering(swapped, softmax):
        through = _logits(swapped, text)
    return _worst(through, _logits(original, text))
