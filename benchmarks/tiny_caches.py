"""A text in two parts, the second with the cache that the first has left, as models write."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from tiny_inputs import Run
from torch import Tensor
from transformers import PreTrainedModel, set_seed

MAIN_OUTPUTS = ("last_hidden_state", "logits")


def text_of(model: PreTrainedModel, run: Run) -> str | None:
    """The name of the text of a run that a cache can cut in two; None where there is none."""
    name = "decoder_input_ids" if "decoder_input_ids" in run.inputs else "input_ids"
    ids = run.inputs.get(name)
    takes = inspect.signature(model.forward).parameters
    whole = not run.part and isinstance(ids, Tensor) and ids.dim() == 2
    return name if whole and "past_key_values" in takes else None


@torch.no_grad()
def second_part(model: PreTrainedModel, run: Run, text: str) -> Tensor | None:
    """The output for the second half of a text, `[B, T / 2, ...]`; None where the model leaves no cache."""
    set_seed(0)
    ids, mask = run.inputs[text], run.inputs.get("attention_mask")
    half = ids.shape[1] // 2
    own_mask = text == "input_ids" and isinstance(mask, Tensor) and mask.shape == ids.shape
    first = dict(run.inputs) | {text: ids[:, :half], "use_cache": True}
    first |= {"attention_mask": mask[:, :half]} if own_mask else {}
    cache = getattr(model(**first), "past_key_values", None)
    if cache is None:
        return None
    if text == "input_ids":  # what stands beside the text belongs to its first part
        then = {"attention_mask": mask} if own_mask else {}
    else:
        then = {name: value for name, value in run.inputs.items() if name != text}
    found = model(**then, **{text: ids[:, half:], "past_key_values": cache, "use_cache": True})
    return without_padding(main_output(found), run, text, half)


def whole_output(outputs: Mapping[str, Any], run: Run, text: str) -> Tensor | None:
    """What `second_part` returns, out of the outputs for the text at once."""
    half = run.inputs[text].shape[1] // 2
    found = main_output(outputs)
    return None if found is None else without_padding(found[:, half:], run, text, half)


def main_output(outputs: Mapping[str, Any]) -> Tensor | None:
    return next((outputs[name] for name in MAIN_OUTPUTS if outputs.get(name) is not None), None)


def without_padding(found: Tensor | None, run: Run, text: str, half: int) -> Tensor | None:
    mask = run.inputs.get("attention_mask")
    if found is None or text != "input_ids" or not isinstance(mask, Tensor) or mask.dim() != 2:
        return found
    return found[mask[:, half:].bool()]
