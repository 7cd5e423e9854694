"""Compute log-likelihoods of continuations in batches, by which choices, minimal pairs and retrieval are scored."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from ..integration.objectives import input_device
from ..sources.blocks import start_tokens


@dataclass(frozen=True)
class Request:
    """Hold the question how likely `target` is after `prompt`.

    Attributes:
        prompt: token ids, at least one.
        target: token ids, at least one.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Hold the log-likelihood of a target.

    Attributes:
        value: log-likelihood summed over the tokens of the target, nats.
        greedy: whether each token of the target is the most likely one.
    """

    value: float
    greedy: bool


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> Request:
    """Return the token ids of a prompt and its target, split as lm-eval splits them.

    Spaces at the end of the prompt belong to the target, and the target is what prompt and target together have more
    than the prompt. The prompt begins as the tokenizer begins a text. An empty prompt becomes the token that starts a
    text, or, in tokenizers without a start token, the token that ends one.

    Raises:
        UsageError: the target adds no tokens, or the prompt is empty and the tokenizer has neither token.
    """
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        prompt, target = prompt[:-spaces], prompt[-spaces:] + target

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    first, whole = start_tokens(tokenizer), encode(prompt + target)
    if not prompt and not first:
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if token is None:
            raise UsageError("the tokenizer has no token that starts or ends a text, so nothing can stand first")
        first = [token]
        whole = whole[1:] if whole[:1] == first else whole
    known = encode(prompt) if prompt else []
    if len(whole) <= len(known):
        raise UsageError(f"the target {target!r} has no tokens of its own after {prompt!r}")
    return Request((*first, *whole[: len(known)]), tuple(whole[len(known) :]))


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    requests: Sequence[Request],
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """Return the log-likelihood of each request, in the order of the requests.

    Requests of similar length share a batch, padded on the left. The log-softmax is computed in float32.

    Args:
        batch_size: requests per forward pass.
        progress: called with the number of requests scored since the last call.

    Raises:
        ValueError: an empty prompt or target.
    """
    if not all(request.prompt and request.target for request in requests):
        raise ValueError("a likelihood needs at least one token before the target and one in it")
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt) - len(requests[i].target))
    found: dict[int, Likelihood] = {}
    for at in range(0, len(order), batch_size):
        batch = [requests[i] for i in order[at : at + batch_size]]
        found |= dict(zip(order[at : at + batch_size], _batch(model, batch), strict=True))
        if progress is not None:
            progress(len(batch))
    return [found[i] for i in range(len(requests))]


def _batch(model: nn.Module, batch: Sequence[Request]) -> list[Likelihood]:
    device = input_device(model)
    rows = [torch.tensor(r.prompt + r.target[:-1]) for r in batch]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    inputs = {"input_ids": ids.to(device)}
    if not mask.all():
        inputs |= {"attention_mask": mask.to(device), "position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(device)}
    logits = last_logits(model, max(len(r.target) for r in batch), **inputs)
    return [
        _score(row[-len(r.target) :], torch.tensor(r.target, device=device))
        for row, r in zip(logits, batch, strict=True)
    ]


def last_logits(model: nn.Module, places: int, **inputs: Tensor) -> Tensor:
    """Return the logits at the last `places` places of each text, `[B, places, vocabulary]`.

    Models that take `logits_to_keep` compute no others: over a long text all of them take a gigabyte, and a fifth of
    the time of a small model.

    Args:
        inputs: what the model reads, by name.
    """
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": places} if takes else {}
    return model(**inputs, use_cache=False, **kept).logits[:, -places:]


def _score(logits: Tensor, target: Tensor) -> Likelihood:
    value = -nn.functional.cross_entropy(logits.float(), target, reduction="sum").item()
    return Likelihood(value, bool((logits.argmax(-1) == target).all()))
