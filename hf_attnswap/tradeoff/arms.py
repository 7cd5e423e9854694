"""The arms of a comparison and what is measured of them."""

import copy
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .. import attentions
from ..config import SwapConfig, parse_options
from ..integration.swapping import swap
from ..sources.conversions import Conversion, find
from ..sources.models import load
from ..training.align import DEFAULT_LEARNING_RATE

DEFAULT_ARMS = "softmax none window relu_norm relu_power relu_power:p=8 identity elu hedgehog hedgehog+window".split()


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
    tasks: tuple[str, ...] = ()  # as `evaluation.tasks.run_tasks` takes them
    task_limit: int | None = None
    include_path: str | None = None
    train_lengths: tuple[int, ...] = ()  # of the `lengths`


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        attention: "mixed" for a conversion whose layers differ. options: of the attention, with all their values.
        layers: which layers are swapped, as `SwapConfig` takes them; None for all.
        conversion: a model of its own, in place of a swap of the model that is compared.
    """

    label: str
    attention: str
    options: dict[str, Any]
    layers: Any = None
    conversion: Conversion | None = None

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """From text such as "relu_power:p=8,shift=none", "none:layers=1::2", or the folder of a conversion; where a
        folder is called as a variant is, the variant is meant.

        Raises:
            UsageError: an unknown attention or option, an unfit value, or a folder without a model.
        """
        name, _, rest = text.partition(":")
        if name not in attentions.names() and Path(text).is_dir():
            return cls.of(find(text))
        options = parse_options([part for part in re.split(r",(?![^[]*\])", rest) if part])
        layers = options.pop("layers", None)
        ((_, (_, values)),) = SwapConfig(name, options=options).plan([0]).items()
        return cls(text, name, values, layers)

    @classmethod
    def of(cls, conversion: Conversion) -> "Arm":
        groups = conversion.swapped
        names = list(dict.fromkeys(group["attention"] for group in groups)) or ["softmax"]
        return cls(
            f"{' and '.join(names)} of {conversion.name}",
            names[0] if len(groups) < 2 else "mixed",
            attentions.get(names[0]).check_options(groups[0]["options"]) if len(groups) == 1 else {},
            conversion.layers,
            conversion,
        )


def with_controls(arms: Sequence[str]) -> list[str]:
    """The arms, after those without which their numbers mean little and that are not among them.

    Those are softmax and no attention; for every hybrid its window alone and its linear part alone, with the same
    options; the window in any case. An arm in some of the layers has its controls in the same ones. Alignment trains
    what a variant adds, and softmax adds nothing, so softmax with the same training is softmax.
    """
    given = [Arm.parse(text) for text in arms]
    wanted: list[tuple[str, dict[str, Any], Any]] = [("softmax", {}, None)]
    swapped = [arm for arm in given if arm.attention != "softmax"]
    for layers in list({json.dumps(arm.layers): arm.layers for arm in swapped}.values()) or [None]:
        wanted.append(("none", {}, layers))
        for arm in [arm for arm in swapped if arm.layers == layers]:
            linear = arm.attention.removesuffix("+window")
            if linear != arm.attention:
                wanted += [("window", arm.options, layers), (linear, arm.options, layers)]
        if all((name, where) != ("window", layers) for name, _, where in wanted):
            wanted.append(("window", {}, layers))
    labels = []
    for name, options, layers in wanted:
        known = attentions.get(name).options()
        told = [f"{k}={json.dumps(v)}" for k, v in options.items() if k in known and v != known[k].default]
        told += [] if layers is None else [f"layers={layers if isinstance(layers, str) else json.dumps(layers)}"]
        label = ":".join(filter(None, [name, ",".join(told)]))
        control = Arm.parse(label)
        same = [arm for arm in given if (arm.attention, arm.options) == (control.attention, control.options)]
        if not any(arm.layers == control.layers and (name != "softmax" or not arm.conversion) for arm in same):
            labels.append(label)
    return list(dict.fromkeys([*labels, *arms]))


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the very same tensors, to swap without touching the first."""
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def build(arm: Arm, model: PreTrainedModel, parameters: Path | None = None) -> PreTrainedModel:
    """A model for the arm over the weights of `model`; softmax is the model itself, not our own path. A conversion has
    weights of its own."""
    if arm.conversion is not None:
        return load(str(arm.conversion.folder), dtype=model.dtype, device=model.device)[0]
    if arm.attention == "softmax":
        return model
    torch.manual_seed(0)
    swapped = swap(share_weights(model), arm.attention, layers=arm.layers, **arm.options)
    if parameters is not None and parameters.is_file():
        swapped.load_state_dict(load_file(parameters), strict=False)
    return swapped.eval()
