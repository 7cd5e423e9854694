"""Time a whole model that reads a prompt (prefill) and then writes token by token (decode)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..config import NAME
from ..integration.attention import attend
from ..integration.cache import cache_nbytes, state_layer
from ..integration.finding import head_shape, inspect
from ..integration.observing import answering, own
from ..integration.swapping import swapped_modules
from ..masks import Mask, Rotation
from .attention import random_inputs
from .measure import peak_memory_mib, seconds


@dataclass(frozen=True)
class Run:
    """Hold the time and memory of one prompt that was read and continued.

    Attributes:
        prefill_s: seconds until the first token.
        decode_s: seconds per further token.
        cache_bytes: bytes of the cache at the end.
        peak_memory_mib: MiB that the prefill needs beyond what was in use before; None where the system does not report
            memory.
    """

    prefill_s: float
    decode_s: float
    cache_bytes: int
    peak_memory_mib: float | None


@torch.no_grad()
def run(model: nn.Module, prompt: Tensor, new_tokens: int) -> Run:
    """Time the reading of a prompt and the greedy decoding of `new_tokens` tokens.

    Args:
        model: a decoder, in eval mode.
        prompt: int64 `[B, n]`, on the device of the model.
    """
    device = prompt.device
    cache = DynamicCache(config=model.config)
    logits = {}

    def prefill() -> None:
        logits["next"] = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    elapsed = {}

    def timed_prefill() -> None:
        elapsed["prefill"] = seconds(prefill, device)

    peak = peak_memory_mib(timed_prefill, device)

    def steps() -> None:
        decode(model, cache, logits["next"].argmax(-1), new_tokens)

    decode_s = seconds(steps, device) / new_tokens
    return Run(elapsed["prefill"], decode_s, cache_nbytes(cache), peak)


@torch.no_grad()
def decode(model: nn.Module, cache: DynamicCache, token: Tensor, steps: int) -> Tensor:
    """Decode `steps` tokens greedily, one at a time, and return the last one, int64 `[B, 1]`.

    Args:
        cache: the cache after the tokens before `token`; each step extends the cache.
        token: int64 `[B, 1]`.
    """
    for _ in range(steps):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits.argmax(-1)
    return token


@torch.no_grad()
def filled_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """Return the cache of a decoder as after `length` tokens of one text, filled from random keys and values.

    The cost of a step does not depend on which tokens came before, so no prompt of that length needs to be read.
    """
    cache, rotations = DynamicCache(config=model.config), _rotations(model)
    for entry in inspect(model):
        heads, module = head_shape(model, [entry]), entry.module
        query, key, value = random_inputs(heads, length, dtype=model.dtype, device=model.device)
        variant = getattr(module, NAME, None)
        if variant is None or not variant.stateful:
            cache.update(key, value, module.layer_idx)
        else:
            layer = state_layer(cache, module.layer_idx, variant)
            layer.update(key, value)
            one = rotations.get(entry.name)
            rotation = None if one is None else one.of(one.turns.expand(-1, length, -1))
            window = entry.reach.sliding_window if variant.slides and entry.kind == "causal" else None
            mask = Mask(length, length, rotation=rotation, window=window)
            attend(variant, query, key, value, mask, heads.head_dim**-0.5, layer)
    return cache


def _rotations(model: PreTrainedModel) -> dict[str, Rotation | None]:
    """Return the rotation of the first token of a text in each layer whose variant undoes it, by path of the layer."""
    found: dict[str, Rotation | None] = {}
    if not any(variant.unrotate for variant in swapped_modules(model).values()):
        return found

    def answer(path, attention, query, key, value, mask, scaling):
        found[path] = mask.rotation
        return own(path, attention, query, key, value, mask, scaling)

    with answering(model, answer):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return found
