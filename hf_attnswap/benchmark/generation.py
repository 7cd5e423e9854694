"""A whole model at work: reading a prompt (prefill), then writing token by token (decode)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..cache import cache_nbytes
from .measure import peak_memory_mib, seconds


@dataclass(frozen=True)
class Run:
    """One prompt read and continued: seconds until the first token, seconds per further token, bytes of the cache,
    and the highest memory of the prefill over what was there before (MiB, None where the system does not tell)."""

    prefill_s: float
    decode_s: float
    cache_bytes: int
    peak_memory_mib: float | None


@torch.no_grad()
def run(model: nn.Module, prompt: Tensor, new_tokens: int) -> Run:
    """Read `prompt` `[B, n]` and write `new_tokens` greedily."""
    device = prompt.device
    cache = DynamicCache(config=model.config)
    logits = {}

    def prefill() -> None:
        logits["next"] = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    elapsed = {}

    def timed_prefill() -> None:
        elapsed["prefill"] = seconds(prefill, device)

    peak = peak_memory_mib(timed_prefill, device)

    def decode() -> None:
        for _ in range(new_tokens):
            token = logits["next"].argmax(-1)
            logits["next"] = model(input_ids=token, past_key_values=cache, use_cache=True).logits

    decode_s = seconds(decode, device) / new_tokens
    return Run(elapsed["prefill"], decode_s, cache_nbytes(cache), peak)
