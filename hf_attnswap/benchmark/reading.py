"""Time models that read one text, by its length: for encoders, which write nothing."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..report.types import Speed
from ..statistics import Spread
from .measure import interleaved, peak_memory_mib, speedup


@torch.no_grad()
def reading(
    models: Mapping[str, nn.Module], lengths: Sequence[int], rounds: int, vocab_size: int
) -> dict[str, list[Speed]]:
    """Time the forward pass of each model by length, in the same rounds as the first model, and measure its memory.

    Args:
        models: models by label, in eval mode, on one device; the first is the control.
        lengths: tokens of a text; one text of random tokens is read at a time.
        rounds: timed rounds per length, after one that does not count.
        vocab_size: number of token ids to draw from.

    Returns:
        For each label one `Speed` per length, in seconds and MiB.
    """
    control, device = next(iter(models)), next(next(iter(models.values())).parameters()).device
    found: dict[str, list[Speed]] = {label: [] for label in models}
    for length in lengths:
        ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        runs = {label: lambda model=model, text=text: model(**text) for label, model in models.items()}
        for run in runs.values():
            run()  # what the first call allocates belongs to no length
        peaks = {label: peak_memory_mib(run, device) for label, run in runs.items()}
        times = interleaved(runs, rounds, device)
        for label in models:
            peak = peaks[label]
            found[label].append(
                Speed(
                    length=length,
                    forward_s=Spread.of(times[label]),
                    forward_speedup=None if label == control else speedup(times[control], times[label]),
                    peak_memory_mib=None if peak is None else max(0.0, peak),
                )
            )
    return found
