"""Free generation: how long a swapped model says what the original says, and whether it repeats itself.

A small difference in likelihood becomes a large one where a model reads its own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Agreement:
    """By prompt, lists of one number each.

    Attributes:
        same: share of the new tokens that are, at their place, those of the original.
        prefix: tokens before the first that differs. told: share of the original's tokens that are the most likely
            ones where the model is given the original's text.
        repetition, repetition_of_control: of each continuation, `repetition_rate`.
    """

    same: list[float]
    prefix: list[int]
    told: list[float]
    repetition: list[float]
    repetition_of_control: list[float]


@torch.no_grad()
def continuations(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """Greedy, exactly `new_tokens` of them after each of the prompts `[N, n]`: `[N, new_tokens]`."""
    prompts = prompts.to(next(model.parameters()).device)
    told = {"do_sample": False, "num_beams": 1, "pad_token_id": model.generation_config.pad_token_id or 0}
    told |= {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "attention_mask": torch.ones_like(prompts)}
    return model.generate(prompts, **told)[:, prompts.shape[1] :].cpu()


@torch.no_grad()
def agreement(model: nn.Module, prompts: Tensor, original: Tensor) -> Agreement:
    """Compare what `model` writes after `prompts` with `original`, the `continuations` of another."""
    prompts = prompts.cpu()
    written = continuations(model, prompts, original.shape[1])
    equal = written == original
    text = torch.cat([prompts, original], dim=1).to(next(model.parameters()).device)
    logits = model(input_ids=text, use_cache=False).logits[:, prompts.shape[1] - 1 : -1]
    ends = model.generation_config.eos_token_id  # which `continuations` does not let a model say
    if ends is not None:
        logits[..., torch.tensor(ends)] = -torch.inf
    said = logits.argmax(-1).cpu()
    return Agreement(
        same=equal.double().mean(1).tolist(),
        prefix=equal.long().cumprod(1).sum(1).tolist(),
        told=(said == original).double().mean(1).tolist(),
        repetition=[repetition_rate(row) for row in written.tolist()],
        repetition_of_control=[repetition_rate(row) for row in original.tolist()],
    )


def repetition_rate(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the runs of `n` tokens that occurred before; 0 where there is no such run."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
