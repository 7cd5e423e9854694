"""The attention alone, at the shape of a model, against torch's scaled_dot_product_attention in the same rounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..attentions import Attention, Heads
from ..masks import Mask
from .measure import Spread, interleaved, peak_memory_mib, speedup


@dataclass(frozen=True)
class Row:
    """One variant at one length: speed-up over SDPA, forward alone and with the backward pass, and peak memory."""

    attention: str
    length: int
    forward: Spread
    forward_backward: Spread
    forward_ms: float
    sdpa_forward_ms: float
    peak_memory_mib: float | None
    sdpa_peak_memory_mib: float | None


def bench(
    variants: dict[str, Attention],
    heads: Heads,
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Measure every variant at every length; feature maps included, inputs random."""
    rows = []
    for length in lengths:
        generator = torch.Generator(device=device).manual_seed(length)
        query, key, value = (
            torch.randn(
                batch_size,
                h,
                length,
                heads.head_dim,
                dtype=dtype,
                device=device,
                generator=generator,
                requires_grad=True,
            )
            for h in (heads.num_attention_heads, heads.num_key_value_heads, heads.num_key_value_heads)
        )
        mask, scaling = Mask(length, length), heads.head_dim**-0.5

        def sdpa(query=query, key=key, value=value, scaling=scaling):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )

        def call(attention, query=query, key=key, value=value, mask=mask, scaling=scaling):
            return attention(query, key, value, mask, scaling)

        runs = {"sdpa": sdpa} | {name: (lambda a=a, call=call: call(a)) for name, a in variants.items()}

        def both(run, query=query, key=key, value=value):
            query.grad = key.grad = value.grad = None
            run().sum().backward()

        with torch.no_grad():
            forward = interleaved(runs, rounds, device)
        train = {name: (lambda run=run, both=both: both(run)) for name, run in runs.items()}
        trained = interleaved(train, rounds, device)
        peaks = {}
        for name, run in train.items():
            query.grad = key.grad = value.grad = None  # what one candidate leaves is not a start for the next
            peaks[name] = peak_memory_mib(run, device)
        for name in variants:
            rows.append(
                Row(
                    name,
                    length,
                    speedup(forward["sdpa"], forward[name]),
                    speedup(trained["sdpa"], trained[name]),
                    Spread.of(forward[name]).median * 1e3,
                    Spread.of(forward["sdpa"]).median * 1e3,
                    peaks[name],
                    peaks["sdpa"],
                )
            )
        if progress is not None:
            progress(length)
    return rows
