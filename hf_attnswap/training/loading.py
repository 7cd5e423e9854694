"""Load the model that a stage trains as the class that it was saved as, and say which stage can train it."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..errors import UsageError
from ..integration.objectives import objective
from ..sources.checksums import require_whole
from ..sources.models import load_any

# A swapped model is a model like any other to these.
_TRAINER = "or train it with the Trainer of transformers, which takes swapped models as they are"


def load_to_train(
    name: str, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Return a model in eval mode, of the class that it was saved as, and what is saved beside it to read its inputs.

    Raises:
        UsageError: no such model, one without a tokenizer, or one that has changed since a stage wrote it.
    """
    require_whole(name)
    model, processor = load_any(name, dtype=dtype)
    if not isinstance(tokenizer_of(processor), PreTrainedTokenizerBase):
        require_text(model, name)
        raise UsageError(f"{name!r} has no tokenizer beside its {type(model).__name__}, and texts are trained on")
    return model.to(device), processor


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model that may take images or sounds beside."""
    return getattr(processor, "tokenizer", processor)


def predicts_next_tokens(model: PreTrainedModel) -> bool:
    """Return whether the model gives the logits of the next token at every place of a text."""
    return objective(model) == "next tokens"


def require_text(model: PreTrainedModel, name: str) -> None:
    """Raise UsageError where a model cannot be trained inside its layers on one text and nothing else.

    Args:
        name: what the user calls the model.
    """
    found = objective(model)
    if found not in ("next tokens", "masked tokens", "labels", "vectors"):
        deals = {"another text": "makes another text of one"}.get(found, f"reads {found}")
        raise UsageError(
            f"{name!r} is a {type(model).__name__}, which {deals}, and stages train on one text: align it with "
            f"hf_attnswap.training.align.aligning in a loop of your own, {_TRAINER}"
        )


def require_next_tokens(model: PreTrainedModel, name: str) -> None:
    """Raise UsageError where a model gives no logits of the next token.

    Args:
        name: what the user calls the model.
    """
    require_text(model, name)
    if not predicts_next_tokens(model):
        raise UsageError(
            f"{name!r} is a {type(model).__name__}, which predicts no next tokens, and this stage trains on them: use "
            f"the stage align, which takes every model that reads text, {_TRAINER}"
        )
