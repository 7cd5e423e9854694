"""The arms of a comparison and what is measured of them."""

import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .. import attentions
from ..config import SwapConfig
from ..errors import UsageError
from ..patching import swap
from ..training.align import DEFAULT_LEARNING_RATE

DEFAULT_ARMS = "softmax none window relu_norm relu_power identity elu hedgehog hedgehog+window".split()


@dataclass(frozen=True)
class Settings:
    """What a run measures. Two runs with equal settings, model and text continue one another."""

    arms: tuple[str, ...]
    context_lengths: tuple[int, ...]
    max_eval_tokens: int
    lengths: tuple[int, ...]
    rounds: int
    decode_tokens: int
    align_tokens: int
    block_size: int
    learning_rate: float = DEFAULT_LEARNING_RATE
    per_device_train_batch_size: int = 1
    seed: int = 0
    diagnose_tokens: int = 0
    tasks: tuple[str, ...] = ()  # of `evaluation.tasks`, and "writing"
    task_limit: int | None = None
    include_path: str | None = None
    train_lengths: tuple[int, ...] = ()  # of the `lengths`


@dataclass(frozen=True)
class Arm:
    """One row of the comparison, from text such as "relu_power:p=8,shift=none"."""

    label: str
    attention: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """UsageError for an unknown attention or option, or an unfit value."""
        name, _, rest = text.partition(":")
        options = parse_options([part for part in rest.split(",") if part])
        ((_, (_, values)),) = SwapConfig(name, options=options).plan([0]).items()
        return cls(text, name, values)


def with_controls(arms: Sequence[str]) -> list[str]:
    """The arms, after those without which their numbers mean little and that are not among them.

    Those are softmax and no attention; for every hybrid its window alone and its linear part alone, with the same
    options; the window in any case. Alignment trains what a variant adds, and softmax adds nothing, so softmax with
    the same training is softmax.
    """
    given = [Arm.parse(text) for text in arms]
    wanted = [("softmax", {}), ("none", {})]
    for arm in given:
        linear = arm.attention.removesuffix("+window")
        if linear != arm.attention:
            wanted += [("window", arm.options), (linear, arm.options)]
    if all(name != "window" for name, _ in wanted):
        wanted.append(("window", {}))
    labels = []
    for name, options in wanted:
        known = attentions.get(name).options()
        own = {key: value for key, value in options.items() if key in known and value != known[key].default}
        label = ":".join(filter(None, [name, ",".join(f"{k}={json.dumps(v)}" for k, v in own.items())]))
        control = Arm.parse(label)
        if not any((arm.attention, arm.options) == (control.attention, control.options) for arm in given):
            labels.append(label)
    return list(dict.fromkeys([*labels, *arms]))


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """`["window=64", "shift=none"]` as a dict; values are read as JSON where they are JSON, else as text."""
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"option {assignment!r} has no value; expected name=value")
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the very same tensors, to swap without touching the first."""
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def build(arm: Arm, model: PreTrainedModel, parameters: Path | None = None) -> PreTrainedModel:
    """A model for the arm over the weights of `model`; softmax is the model itself, not our own path."""
    if arm.attention == "softmax":
        return model
    torch.manual_seed(0)
    swapped = swap(share_weights(model), arm.attention, **arm.options)
    if parameters is not None and parameters.is_file():
        swapped.load_state_dict(load_file(parameters), strict=False)
    return swapped.eval()
