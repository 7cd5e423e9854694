"""What a model makes of its input, how long that may be and where it goes: by this a model is measured and trained."""

import re
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
)

from ..errors import UsageError
from .finding import inspect

Objective = Literal[
    "next tokens", "masked tokens", "labels", "vectors", "another text", "speech", "images", "several inputs"
]
_SPEECH = re.compile("input_features|input_values|audio|spectrogram|waveform")
_IMAGES = re.compile("pixel_values|patches")
_SPARE = 4  # rows of a table of positions beyond those that its config counts


def objective(model: PreTrainedModel) -> Objective:
    """Return what a model makes of its input.

    - of one text: "next tokens", "masked tokens", "labels" (any other head) or "vectors" (no head)
    - of one text "another text": encoder-decoders
    - of other input: "speech", "images", or "several inputs" at once, such as the choices of a question
    """
    if _SPEECH.search(model.main_input_name):
        return "speech"
    if _IMAGES.search(model.main_input_name):
        return "images"
    if getattr(model.config, "is_encoder_decoder", False):
        return "another text"
    writes = model.can_generate() and model.get_output_embeddings() is not None
    if type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or writes:
        kinds = {module.kind for module in inspect(model)}
        # With attention to both sides the next token is there to be read.
        return "next tokens" if writes and ("causal" in kinds or not kinds) else "masked tokens"
    choices = type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()
    if choices or any(getattr(model.config, f"{part}_config", None) is not None for part in ("vision", "audio")):
        return "several inputs"
    return "vectors" if model.base_model is model else "labels"


def input_device(model: nn.Module) -> torch.device:
    """Return the device of what a model is given: that of its first parameter which is not offloaded, else the CPU.

    Where parameters are offloaded, accelerate moves what the model is given.
    """
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens of text a model can read at most, where it has learned a vector for each position.

    None where positions are computed (rotary, ALiBi, sinusoids): such a model reads longer texts than it was trained
    for, well or not.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    found = []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        table = isinstance(module, nn.Embedding) and re.search("pos|wpe", own) and "rel" not in own
        if not table or not 0 <= module.num_embeddings - limit <= _SPARE:  # that of an image has another size
            continue
        # Some count positions from an offset, or from behind the padding token.
        first = 0 if module.padding_idx is None else module.padding_idx + 1
        found.append(module.num_embeddings - (getattr(module, "offset", None) or first))
    return min(found, default=None)


def require_positions(model: PreTrainedModel, needed: int, what: str) -> None:
    """Raise UsageError where `needed` tokens are more than the model has positions for.

    Args:
        what: what asks for so many tokens, such as an option: "--length".
    """
    limit = learned_positions(model)
    if limit is not None and needed > limit:
        raise UsageError(
            f"{what} takes {needed} tokens, and {type(model).__name__} has learned positions for {limit}: "
            f"give at most {limit}"
        )
