"""Define the arms of a comparison and what is measured of each arm."""

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .. import attentions
from ..config import SwapConfig, parse_options, places_of
from ..errors import UsageError
from ..integration.swapping import swap
from ..sources.conversions import Conversion, find
from ..sources.models import load
from ..sources.plans import read_plan
from ..statistics import FEW
from ..training.align import DEFAULT_LEARNING_RATE

DEFAULT_ARMS = "softmax none window relu_norm relu_power elu hedgehog hedgehog+window".split()


@dataclass(frozen=True)
class Settings:
    """Hold what a run measures; a run continues an earlier one of equal settings, model and texts.

    Attributes:
        arms: texts that `Arm.parse` reads.
        context_lengths: tokens of the contexts at which perplexity and tasks are measured.
        max_eval_tokens: tokens of held-out text per context length; None for 500 blocks, from which on an interval is
            not rough. Where the text has fewer, all of it.
        lengths: tokens of the prompts at which speed is measured.
        rounds: rounds of timings per length.
        decode_tokens: tokens that are decoded after each prompt.
        align_tokens: tokens of training text for the alignment of an arm; 0 for no alignment.
        block_size: tokens per block of training text.
        learning_rate: highest learning rate of the alignment.
        per_device_train_batch_size: blocks per step of the alignment.
        seed: seed of the order of the training blocks and of the tasks.
        diagnose_tokens: tokens of the text for the diagnosis; 0 for no diagnosis.
        tasks: tasks, as `evaluation.tasks.run_tasks` takes them.
        task_limit: the most items per task; None leaves the number to the task.
        task_lengths: tokens of the texts that tasks make; none for the `context_lengths`.
        include_path: a folder of task files (yaml) for lm-eval.
        train_lengths: which of the `lengths` a training step is timed at.
        equal_controls: whether the windows of equal state and of equal time stand beside every arm with a state, see
            `controls`.
    """

    arms: tuple[str, ...]
    context_lengths: tuple[int, ...]
    max_eval_tokens: int | None
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
    task_lengths: tuple[int, ...] = ()
    train_lengths: tuple[int, ...] = ()  # of the `lengths`
    equal_controls: bool = False

    def blocks(self, context: int) -> int:
        """Return on how many blocks of `context` tokens perplexity is measured at most."""
        return FEW if self.max_eval_tokens is None else self.max_eval_tokens // context

    @property
    def eval_tokens(self) -> int:
        """Return on how many tokens the perplexity of an arm is measured at most."""
        return sum(self.blocks(context) * context for context in self.context_lengths)


@dataclass(frozen=True)
class Arm:
    """Describe one row of the comparison.

    Attributes:
        label: the name of the row.
        attention: name of the variant; "mixed" for a conversion whose layers differ.
        options: options of the variant, with all their values; empty where the layers differ.
        layers: which layers are swapped, as `SwapConfig` takes them; None for all.
        keep: the key/value groups that keep softmax in these layers, as `SwapConfig` takes them; None for none.
        conversion: a saved model to measure; None for a swap of the model that is compared.
        is_control: whether it stands here only as a control of others, see `controls`.
    """

    label: str
    attention: str
    options: dict[str, Any]
    layers: Any = None
    keep: Any = None
    conversion: Conversion | None = None
    is_control: bool = False

    @property
    def swap(self) -> SwapConfig:
        """Return the swap of an arm that is no conversion."""
        return SwapConfig(self.attention, self.layers, self.options, keep=self.keep)

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Return the arm that a text names.

        The text is a variant with its options, such as "relu_power:p=8,shift=none", "none:layers=1::2" or
        "window:window=128,keep=[18.2,8.0]"; a plan file (.yaml); or the folder of a conversion. A text that is the name
        of a variant means the variant, even where a folder has that name.

        Raises:
            UsageError: an unknown attention or option, an unfit value, a plan that cannot be read, or a folder without
                a model.
        """
        name, _, rest = text.partition(":")
        if name not in attentions.names() and Path(text).is_dir():
            return cls.of(find(text))
        if text.endswith((".yaml", ".yml")):
            plan = read_plan(text).swap
            mixed = isinstance(plan.layers, Mapping)
            values = {} if mixed else attentions.get(plan.attention).check_options(plan.options)
            return cls(Path(text).stem, "mixed" if mixed else plan.attention, values, plan.layers, plan.keep)
        told = [part for part in re.split(r",(?![^[]*\])", rest) if part]
        kept = [part for part in told if part.startswith("keep=")]  # which as numbers would lose the 0 of 8.10
        options = parse_options([part for part in told if part not in kept])
        layers = options.pop("layers", None)
        keep = [place for part in kept for place in places_of(part.removeprefix("keep=").strip("[]"))]
        SwapConfig(name, layers, options, keep=keep or None)
        try:
            values = attentions.get(name).check_options(options)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return cls(text, name, values, layers, keep or None)

    @classmethod
    def of(cls, conversion: Conversion) -> "Arm":
        """Return the arm that measures a conversion."""
        groups = conversion.swapped
        names = list(dict.fromkeys(group["attention"] for group in groups)) or ["softmax"]
        return cls(
            f"{' and '.join(names)} of {conversion.name}",
            names[0] if len(groups) < 2 else "mixed",
            attentions.get(names[0]).check_options(groups[0]["options"]) if len(groups) == 1 else {},
            conversion.layers,
            conversion=conversion,
        )


def with_controls(arms: Sequence[str]) -> list[str]:
    """Return the given arms after the controls that are missing among them, without which their numbers mean little.

    Controls are softmax; no attention; for every hybrid its window alone and its linear part alone, with the same
    options; and a window in any case. The controls of an arm that swaps some layers swap the same layers; an arm that
    keeps some groups of its layers has those of all layers beside it. Alignment trains only what a variant adds, and
    softmax adds nothing, so softmax with the same training is softmax.

    Raises:
        UsageError: `Arm.parse` cannot read an arm.
    """
    given = [Arm.parse(text) for text in arms]
    wanted: list[tuple[str, dict[str, Any], Any]] = [("softmax", {}, None)]
    whole = [arm for arm in given if arm.keep is None and not isinstance(arm.layers, Mapping)]
    swapped = [arm for arm in whole if arm.attention != "softmax"]
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
        same = [arm for arm in whole if (arm.attention, arm.options) == (control.attention, control.options)]
        if not any(arm.layers == control.layers and (name != "softmax" or not arm.conversion) for arm in same):
            labels.append(label)
    return list(dict.fromkeys([*labels, *arms]))


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model over the very same tensors, to be swapped while the first stays as it is."""
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def build(arm: Arm, model: PreTrainedModel, parameters: Path | None = None) -> PreTrainedModel:
    """Return the model of an arm in eval mode, over the weights of `model` unless the arm is a conversion.

    For softmax the function returns `model` itself, with the attention of transformers. A conversion is loaded with the
    dtype and device of `model`.

    Args:
        parameters: a safetensors file of the trained parameters of the variants, loaded where the file exists.
    """
    if arm.conversion is not None:
        return load(str(arm.conversion.folder), dtype=model.dtype, device=model.device)[0]
    if arm.attention == "softmax":
        return model
    torch.manual_seed(0)
    swapped = swap(share_weights(model), arm.swap)
    if parameters is not None and parameters.is_file():
        swapped.load_state_dict(load_file(parameters), strict=False)
    return swapped.eval()
