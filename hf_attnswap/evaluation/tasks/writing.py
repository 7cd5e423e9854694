"""Compare free generation: how long a model writes what its control writes, and whether the model repeats itself.

A small difference in likelihood becomes a large one where a model reads its own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...errors import UsageError
from ...integration.objectives import input_device, require_positions
from ...sources.blocks import cut, start_tokens
from ..result import Result
from .base import Task, TaskInputs
from .registry import register


@register
@dataclass(frozen=True)
class WritingTask(Task):
    """Continue the starts of a text greedily, and compare the continuations with what the control writes.

    Without a control only the repetition is measured.

    Attributes:
        prompts: number of starts, cut one after another from the text, whatever `TaskInputs.limit` says.
        text_tokens: tokens per start.
        new_tokens: tokens that are written after each start.
    """

    name = "writing"
    measures = "How long the model writes on as its control does, and whether it repeats itself."
    prompts: int = 8
    text_tokens: int = 64
    new_tokens: int = 64

    def answer(self, model, tokenizer, inputs) -> list[list[int]]:
        require_positions(model, self.text_tokens + self.new_tokens, f"task {self.name!r}")
        return continuations(model, self.starts(tokenizer, inputs), self.new_tokens).tolist()

    def run(self, model, tokenizer, inputs, control=None) -> list[Result]:
        require_positions(model, self.text_tokens + self.new_tokens, f"task {self.name!r}")
        starts = self.starts(tokenizer, inputs)
        if control is None:
            written = continuations(model, starts, self.new_tokens).tolist()
            return [Result(self.name, "repetition", tuple(map(repetition_rate, written)), higher_is_better=False)]
        result = agreement(model, starts, torch.tensor(control))
        return [
            Result(self.name, "tokens as the control's", tuple(result.same)),
            Result(self.name, "tokens before the first other", tuple(map(float, result.prefix))),
            Result(self.name, "agreement when told the control's", tuple(result.told)),
            Result(self.name, "repetition", tuple(result.repetition), higher_is_better=False),
        ]

    def starts(self, tokenizer: PreTrainedTokenizerBase, inputs: TaskInputs) -> Tensor:
        """Return the starts that are continued, int64 `[N, text_tokens]`, each begun as the tokenizer begins a text.

        Raises:
            UsageError: the text is shorter than one start.
        """
        stream = inputs.tokens.reshape(-1)
        if len(stream) < self.text_tokens:
            raise UsageError(f"task {self.name!r} needs a text of {self.text_tokens} tokens, not {len(stream)}")
        return cut(stream, self.text_tokens, start_tokens(tokenizer))[: self.prompts]


@dataclass(frozen=True)
class Agreement:
    """Hold how far a model writes what the original writes; each list has one number per prompt.

    Attributes:
        same: share of the new tokens that equal the original's at the same place.
        prefix: number of tokens before the first that differs.
        told: share of the original's tokens that are the model's most likely ones where the model reads the original's
            text.
        repetition: `repetition_rate` of what the model writes.
    """

    same: list[float]
    prefix: list[int]
    told: list[float]
    repetition: list[float]


@torch.no_grad()
def continuations(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """Write exactly `new_tokens` tokens after each prompt, greedily.

    Args:
        prompts: int64 `[N, n]`, without padding.

    Returns:
        int64 `[N, new_tokens]`, on the CPU.
    """
    prompts = prompts.to(input_device(model))
    told = {"do_sample": False, "num_beams": 1, "pad_token_id": model.generation_config.pad_token_id or 0}
    told |= {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "attention_mask": torch.ones_like(prompts)}
    return model.generate(prompts, **told)[:, prompts.shape[1] :].cpu()


@torch.no_grad()
def agreement(model: nn.Module, prompts: Tensor, original: Tensor) -> Agreement:
    """Compare what `model` writes after each prompt with what another model wrote.

    Args:
        prompts: int64 `[N, n]`.
        original: the `continuations` of the other model, int64 `[N, new_tokens]`, on the CPU.
    """
    prompts = prompts.cpu()
    written = continuations(model, prompts, original.shape[1])
    equal = written == original
    text = torch.cat([prompts, original], dim=1).to(input_device(model))
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
    )


def repetition_rate(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of the runs of `n` tokens that occurred before; 0 where there is no run of `n` tokens."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
