"""What a model loses where groups lose their softmax: the texts that tell, and the distance of answers on them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..evaluation.likeness import logits_or_hidden
from ..evaluation.predictions import MASKED, NOTHING
from ..integration.objectives import Objective, objective, require_positions
from ..sources.blocks import end_tokens, start_tokens


@dataclass(frozen=True)
class Text:
    """Hold one text as a model reads it.

    Attributes:
        ids: int64 `[n]`.
        labels: the token that is told at each place, `NOTHING` where none counts; int64 `[n]`, None for models that
            tell no tokens.
        source: what the encoder of an encoder-decoder reads, int64 `[m]`; `ids` is then what its decoder reads.
    """

    ids: Tensor
    labels: Tensor | None
    source: Tensor | None = None


@dataclass(frozen=True)
class Texts:
    """Make the texts of one model from a stream of tokens: plain ones, and ones that are written twice.

    In a text that is written twice only what is told of the second half counts, which a model can copy. Of an
    encoder-decoder, the encoder reads the first half and the decoder tells the second.

    Attributes:
        length: tokens of a text.
        start, end: tokens that begin and end every text.
        predicts: what the model makes of a text, see `integration.objectives`.
        mask: the token that stands for a masked one; None where nothing is masked.
        first: the token that begins what a decoder of another text reads; None for other models.
    """

    length: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    predicts: Objective
    mask: int | None
    first: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> "Texts":
        """Return what makes texts of `length` tokens for a model.

        Raises:
            UsageError: the model reads something else than one text, has fewer positions, or has no token for a mask.
        """
        predicts = objective(model)
        if predicts in ("speech", "images", "several inputs"):
            raise UsageError(
                f"{type(model).__name__} reads {predicts}, and a plan is made on plain texts: name the groups to keep "
                "yourself, by swap(keep=...)"
            )
        if length < 16:
            raise UsageError(f"texts of {length} tokens are too short to plan on: give a context length of 16 or more")
        require_positions(model, length, "--context_length")
        mask = getattr(tokenizer, "mask_token_id", None) if predicts == "masked tokens" else None
        if predicts == "masked tokens" and mask is None:
            raise UsageError(f"{type(model).__name__} predicts masked tokens, and its tokenizer has none for a mask")
        end = () if predicts in ("next tokens", "another text") else tuple(end_tokens(tokenizer))
        first = getattr(model.config, "decoder_start_token_id", None) if predicts == "another text" else None
        if predicts == "another text" and first is None:
            raise UsageError(f"{type(model).__name__} has no decoder_start_token_id in its config to begin a text with")
        start = () if predicts == "another text" else tuple(start_tokens(tokenizer))
        return cls(length, start, end, predicts, mask, first)

    @property
    def own(self) -> int:
        """Return how many tokens of the stream a plain text has."""
        return self.length - len(self.start) - len(self.end)

    @property
    def tells_tokens(self) -> bool:
        """Return whether the model predicts tokens, so that there is a perplexity, and texts can be copied."""
        return self.predicts in ("next tokens", "masked tokens", "another text")

    def plain(self, stream: Tensor, at: int, seed: int = 0) -> Text:
        """Return the text that begins at token `at` of a stream `[n]`; `seed` draws what is masked."""
        own = stream[at : at + self.own]
        return self._text(own, 0, seed) if self.first is None else self._another(*own.tensor_split(2))

    def twice(self, stream: Tensor, at: int, seed: int = 0) -> Text:
        """Return a text whose second half repeats its first half, as `plain`."""
        half = self.own // 2
        own = stream[at : at + half]
        return self._text(own.repeat(2), half, seed) if self.first is None else self._another(own, own)

    def _another(self, source: Tensor, told: Tensor) -> Text:
        told = told.long()
        ids = torch.cat([torch.tensor([self.first]), told[:-1]])
        return Text(ids, told, source.long())

    def _text(self, own: Tensor, first: int, seed: int) -> Text:
        begin, finish = (torch.tensor(tokens, dtype=torch.int64) for tokens in (self.start, self.end))
        ids = torch.cat([begin, own.long(), finish])
        first += len(begin)
        labels = torch.full_like(ids, NOTHING)
        if self.predicts == "next tokens":
            labels[first:-1] = ids[first + 1 :]
            if len(begin) and first == len(begin):
                labels[first - 1] = ids[first]
        elif self.predicts == "masked tokens":
            places = torch.arange(first, len(ids) - len(finish))
            drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
            places = places[drawn[: max(1, round(MASKED * len(places)))]]
            labels[places] = ids[places]
            ids[places] = self.mask
        else:
            return Text(ids, None)
        return Text(ids, labels)


def answer(model: nn.Module, text: Text) -> Tensor:
    """Return what a model makes of a text: log-probabilities where tokens are told, `[m, vocabulary]`; else a vector.

    The vector is the logits of a model with another head, or the mean of the last hidden states.
    """
    device = next(model.parameters()).device
    given = {"input_ids": text.ids.to(device)[None]}
    if text.source is not None:
        given = {"input_ids": text.source.to(device)[None], "decoder_input_ids": given["input_ids"]}
    if getattr(model.config, "use_cache", None):
        given["use_cache"] = False
    returned = model(**given)
    if text.labels is None:
        found = logits_or_hidden(returned)
        return found.mean(1).flatten() if found.dim() == 3 else found.flatten()
    logits = returned.logits[0]
    return logits[(text.labels != NOTHING).to(logits.device)].float().log_softmax(-1)


def distance(wanted: Tensor, found: Tensor, text: Text) -> Tensor:
    """Return how far one answer is from another, a number that can be differentiated by `found`.

    That is KL(wanted || found) in nats, the mean over the places; for vectors `|found - wanted|^2 / |wanted|^2`.
    """
    if text.labels is not None:
        return nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / len(found)
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)


def nll(found: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood, nats per token, of what the labels of a text tell in an answer to it."""
    return nn.functional.nll_loss(found, labels[labels != NOTHING].to(found.device)).item()
