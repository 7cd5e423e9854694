"""What each swapped layer costs by itself: one forward pass per layer, all others running softmax."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..observing import answering, own, softmax
from ..patching import swapped_modules


@dataclass(frozen=True)
class LayerDamage:
    """One layer swapped, the others not. The reference has `layer` None, and no divergence.

    Attributes:
        kl: mean over tokens of KL(original || with this layer swapped) of the next token, nats; kl_error its standard
            error, from the spread between texts (NaN for one text).
        nll: mean negative log-likelihood of the text. perplexity: its exponential.
    """

    layer: str | None
    kl: float
    kl_error: float
    nll: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700))


@torch.no_grad()
def layer_damage(
    model: nn.Module, blocks: Tensor, progress: Callable[[str], None] = lambda line: None
) -> list[LayerDamage]:
    """The damage of every swapped layer of a language model, the reference (softmax in all of them) first.

    Args:
        blocks: texts `[N, n]`, int64; cost: N (layers + 1) forward passes of n tokens.

    Raises:
        UsageError: the model is not swapped.
    """
    layers = list(swapped_modules(model))
    device = next(model.parameters()).device
    kl = torch.zeros(len(layers), len(blocks), dtype=torch.float64)
    nll = torch.zeros(len(layers) + 1, len(blocks), dtype=torch.float64)
    chosen: str | None = None

    def answer(name, *arguments):
        return (own if name == chosen else softmax)(name, *arguments)

    with answering(model, answer):
        for text, block in enumerate(blocks.to(device)):

            def log_probabilities(block: Tensor = block) -> Tensor:
                return model(input_ids=block[None], use_cache=False).logits[0].float().log_softmax(-1)

            chosen = None
            original = log_probabilities()
            nll[0, text] = nn.functional.nll_loss(original[:-1], block[1:]).item()
            for index, chosen in enumerate(layers):  # noqa: B007 (`answer` reads it)
                progress(f"damage of layer {index + 1} of {len(layers)}, text {text + 1} of {len(blocks)}")
                found = log_probabilities()
                kl[index, text] = (
                    nn.functional.kl_div(found, original, reduction="none", log_target=True).sum(-1).mean()
                )
                nll[index + 1, text] = nn.functional.nll_loss(found[:-1], block[1:]).item()
    error = kl.std(1) / math.sqrt(len(blocks)) if len(blocks) > 1 else torch.full((len(layers),), math.nan)
    means, likelihoods = kl.mean(1).tolist(), nll.mean(1).tolist()
    rows = zip(layers, means, error.tolist(), likelihoods[1:], strict=True)
    return [LayerDamage(None, 0.0, 0.0, likelihoods[0]), *(LayerDamage(*row) for row in rows)]
