"""What a planning is asked for, and the text that it reads."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import SwapConfig
from ..errors import UsageError
from ..sources.texts import TextSource, token_stream
from .losses import Texts

MOST_TOKENS = 1_000_000  # of the text to plan on


@dataclass(frozen=True)
class Settings:
    """Hold what a planning does; a run goes on with an earlier one of equal settings, model and texts.

    Attributes:
        budget: texts that `Budget.parse` reads.
        attention: the variant that stands where softmax is not kept.
        options: its options.
        kinds: which attention is planned, as in `SwapConfig`.
        context_length: tokens of a text.
        steps: gradients of the search, of which the first 8 only score.
        texts: held-out texts that verify a plan; an interval needs 8.
        seed: of the places in the text.
    """

    budget: tuple[str, ...]
    attention: str
    options: dict[str, Any]
    kinds: tuple[str, ...]
    context_length: int
    steps: int
    texts: int
    seed: int

    @classmethod
    def of(cls, budget, attention, options, kinds, *rest) -> "Settings":
        """Return settings; the window is 128 tokens and the kinds are those of `SwapConfig` where nobody says so."""
        options = {"window": 128, **options} if attention == "window" else dict(options)
        budget = (budget,) if isinstance(budget, str) else tuple(budget)
        return cls(budget, attention, options, SwapConfig(kinds=kinds or SwapConfig.kinds).kinds, *rest)


def streams(
    tokenizer: PreTrainedTokenizerBase,
    training_text: TextSource,
    held_out_text: TextSource | None,
    texts: Texts,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Return the tokens to plan on and the tokens to verify on, int64 `[n]`; a fifth is held out where no text is.

    Raises:
        UsageError: a text is too short.
    """
    training = token_stream(training_text, tokenizer, MOST_TOKENS)
    if held_out_text is None:
        split = len(training) - len(training) // 5
        training, held_out = training[:split], training[split:]
    else:
        held_out = token_stream(held_out_text, tokenizer, settings.texts * texts.own)
    needed = {"plan on": (training, 4 * texts.own), "verify on": (held_out, settings.texts * texts.own)}
    for purpose, (stream, least) in needed.items():
        if len(stream) < least:
            own = held_out_text is not None and purpose == "verify on"
            name = (held_out_text if own else training_text).name
            raise UsageError(
                f"text {name!r} leaves {len(stream)} tokens to {purpose}, and {least} are needed: give more text, a "
                "shorter context length or fewer texts"
            )
    return training, held_out
