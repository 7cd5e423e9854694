"""Define the options of training: dataclass fields that are arguments on the command line and keys in a recipe.

A field is part of the identity of a run, which a resumed run must share, unless the field says that it is not.
"""

import argparse
import dataclasses
import json
import math
import shlex
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from accelerate.utils import LoggerType

from ..config import SwapConfig, parse_options
from ..errors import Parser, UsageError
from ..sources.plans import read_plan

Options = TypeVar("Options")
_AT_LEAST_0 = (
    "learning_rate", "new_parameters_learning_rate", "final_learning_rate", "weight_decay", "num_warmup_steps"
)  # fmt: skip


def argument(
    default: Any = MISSING, help: str = "", *, elsewhere: bool = False, compared_as: str = "", **more: Any
) -> Any:
    """Return a dataclass field that is an option of a stage.

    Args:
        default: the value where the option is not given; without a default the option must be given.
        help: what `--help` says of the option.
        elsewhere: True for an option that says where a run takes place or what is watched, not what the run does. A
            resumed run may have another value, and a model card leaves the option out.
        compared_as: the setting of `training.loop.train` that stands for this option when a run is resumed, where two
            values of the option may mean the same run.
        more: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    metadata = {"help": help, "elsewhere": elsewhere, "compared_as": compared_as, "more": more}
    return dataclasses.field(default=default, metadata=metadata)


def positive(text: str) -> int:
    """Return the positive integer that `text` stands for.

    Raises:
        argparse.ArgumentTypeError: the integer is below 1.
        ValueError: the text is no integer.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def seed(text: str) -> int:
    """Return the seed that `text` stands for, which numpy takes as well.

    Raises:
        argparse.ArgumentTypeError: the integer is negative, or needs more than 32 bits.
        ValueError: the text is no integer.
    """
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to {2**32 - 1}")
    return value


def share(text: str) -> float:
    """Return the number from 0 to below 1 that `text` stands for.

    Raises:
        argparse.ArgumentTypeError: the number is another one.
        ValueError: the text is no number.
    """
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to below 1")
    return value


@dataclass(kw_only=True)
class TrainingOptions:
    """Hold the options of every program that trains a model; each field has its `--help` text.

    Raises:
        UsageError: a rate, a weight decay or a number of steps that is negative or not finite; or a plan beside what a
            plan says.
    """

    model_name_or_path: str = argument(help="a Hub id, a folder or a .gguf file")
    dtype: str = argument("float32", "dtype of the weights")
    attention: str | None = argument(None, "swap to this variant first, see `attnswap ls`")
    layers: str | None = argument(None, "layers to swap, a slice '1::2' or indices '0,3,5'; all without it")
    keep: str | None = argument(None, "groups that keep softmax in these layers, layer.group such as '18.2,8.0'")
    plan: str | None = argument(
        None, "a plan.yaml, see `attnswap plan`, in place of --attention, --layers, --keep and --option",
        metavar="FILE", elsewhere=True,
    )  # fmt: skip
    option: list[str] | None = argument(None, "option of the variant; may be repeated", metavar="NAME=VALUE")
    output_dir: Path = argument(help="a new or empty folder", elsewhere=True)
    per_device_train_batch_size: int = argument(
        1, "blocks per batch and process", type=positive, compared_as="blocks per step"
    )
    gradient_accumulation_steps: int = argument(
        1, "batches per process and step", type=positive, compared_as="blocks per step"
    )
    learning_rate: float = argument(1e-4, "highest learning rate of AdamW")
    new_parameters_learning_rate: float | None = argument(
        None, "learning rate of the swapped attention's own parameters; --learning_rate without it"
    )
    final_learning_rate: float = argument(0.0, "learning rate at the end of the cosine")
    num_warmup_steps: int = argument(0, "steps of linear warm-up before the cosine")
    weight_decay: float = argument(0.0, "weight decay of AdamW")
    seed: int = argument(0, "seed of new weights, dropout and the order of the text", type=seed)
    checkpointing_steps: int | None = argument(
        None, "write a checkpoint every so many steps; none without it", type=positive, elsewhere=True
    )
    resume_from_checkpoint: str | None = argument(
        None,
        "a checkpoint, or 'latest' for the newest one in output_dir, which starts anew where there is none",
        metavar="FOLDER",
        elsewhere=True,
    )
    with_tracking: bool = argument(False, "report to the trackers that are installed", elsewhere=True)
    report_to: str = argument("all", "the tracker to report to", choices=LoggerType.list(), elsewhere=True)

    def __post_init__(self) -> None:
        for name in _AT_LEAST_0:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} is {value}; expected a number of at least 0")
        if self.final_learning_rate and not self.learning_rate:
            raise UsageError(f"final_learning_rate is {self.final_learning_rate}, where learning_rate is 0")
        for name, value in (options_of_plan(self.plan) if self.plan else {}).items():
            if getattr(self, name) not in (None, value):
                raise UsageError(f"--plan says all of the swap: leave out --{name}")
            setattr(self, name, value)


@dataclass(kw_only=True)
class TextOptions(TrainingOptions):
    """Hold the options of a stage that trains on blocks of text.

    Raises:
        UsageError: not exactly one of `train_file` and `dataset_name`, or of `max_train_steps` and `max_train_tokens`.
    """

    train_file: str | None = argument(None, "text, json, jsonl, parquet, csv or tsv", compared_as="text")
    dataset_name: str | None = argument(None, "a dataset of the Hub, in place of --train_file", compared_as="text")
    dataset_config_name: str | None = argument(None, "configuration of the dataset", compared_as="text")
    text_column: str = argument("text", "column that holds the text", compared_as="text")
    block_size: int = argument(512, "tokens per block", type=positive)
    text_lengths: str | None = argument(
        None, "cut the blocks of each batch into texts of one of these lengths in turn, such as '512,1024,2048'"
    )
    separate_documents: bool = argument(
        False, "rows of the source share blocks, but neither attention nor loss reaches across"
    )
    max_train_steps: int | None = argument(None, "optimiser steps", type=positive)
    max_train_tokens: int | None = argument(
        None, "tokens over all processes, in whole steps; in place of --max_train_steps", type=positive
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for names in (("train_file", "dataset_name"), ("max_train_steps", "max_train_tokens")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) != 1:
                both = "not both" if given else "which are missing"
                raise UsageError(f"give either --{names[0]} or --{names[1]}, {both}")
        if self.separate_documents and self.text_lengths:
            raise UsageError("--separate_documents and --text_lengths both say where texts end: give one of them")
        self.lengths_of_texts()

    def lengths_of_texts(self) -> list[int]:
        """Return the numbers that `text_lengths` holds.

        Raises:
            UsageError: one of them is no number of at least 2 tokens, or does not divide `block_size`.
        """
        lengths = []
        for text in (self.text_lengths or "").split(",") if self.text_lengths else ():
            length = int(text) if text.strip().isdecimal() and len(text) < 10 else 0
            if length < 2 or self.block_size % length:
                raise UsageError(
                    f"--text_lengths has {text.strip()!r}; expected divisors of --block_size {self.block_size}"
                )
            lengths.append(length)
        return lengths


@dataclass(kw_only=True)
class LoraOptions:
    """Hold the options of a stage that can train the projections by LoRA."""

    use_lora: bool = argument(False, "train LoRA weights on the attention's projections in place of all weights")
    lora_r: int = argument(16, "rank of LoRA", type=positive)
    lora_alpha: int = argument(32, "scale of LoRA", type=positive)
    lora_dropout: float = argument(0.0, "dropout of LoRA", type=share)


@dataclass(kw_only=True)
class WholeModelOptions(LoraOptions):
    """Hold the options of a stage that trains on the output of the whole model."""

    gradient_checkpointing: bool = argument(
        False,
        "compute layers again in the backward pass: less memory, about a third more time, the same gradients",
        elsewhere=True,
    )
    freeze_embeddings: bool = argument(
        False,
        "leave the input and output embeddings as they are: where these are tied, they hold the space in which the "
        "original's logits arise",
    )
    validation_file: str | None = argument(
        None, "log the perplexity on this text, read as the training file is", elsewhere=True
    )
    validation_steps: int = argument(100, "steps between two validations", type=positive, elsewhere=True)
    max_validation_tokens: int = argument(8192, "tokens of the validation", type=positive, elsewhere=True)


def options_of_plan(path: str) -> dict[str, Any]:
    """Return what a plan file says as values of `attention`, `layers`, `keep` and `option`.

    Raises:
        UsageError: the file cannot be read, or is a plan for other kinds of attention than a stage swaps.
    """
    plan = read_plan(path).swap
    if plan.kinds != SwapConfig.kinds:
        raise UsageError(
            f"plan {path!r} is for {' and '.join(plan.kinds)} attention, which no stage swaps: save the swapped model "
            "with `attnswap convert --plan`, and train that"
        )
    layers = plan.layers
    if isinstance(layers, Mapping):
        layers = json.dumps(dict(layers))
    elif layers is not None and not isinstance(layers, str):
        layers = ",".join(map(str, layers))
    return {
        "attention": plan.attention,
        "layers": layers,
        "keep": None if plan.keep is None else ",".join(plan.keep),
        "option": [f"{name}={json.dumps(value)}" for name, value in plan.options.items()] or None,
    }


def identity(options: Any) -> dict[str, Any]:
    """Return what a run and one that continues it must share: all fields except those marked otherwise."""
    kept = [
        field.name
        for field in dataclasses.fields(options)
        if not field.metadata.get("elsewhere") and not field.metadata.get("compared_as")
    ]
    return {"stage": type(options).__name__} | {name: _plain(getattr(options, name)) for name in kept}


def deeds(options: Any) -> dict[str, Any]:
    """Return the options that say what a run did, as keys of a recipe.

    The options are those that differ from their defaults, except those that say where the run took place.
    """
    kept = {
        field.name: _plain(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if not field.metadata.get("elsewhere") and getattr(options, field.name) != field.default
    }
    return {"options" if k == "option" else k: parse_options(v) if k == "option" else v for k, v in kept.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def add_options(
    parser: argparse.ArgumentParser, options: type, *, optional: bool = False, without: Sequence[str] = ()
) -> None:
    """Add an argument to `parser` for each field of a dataclass that the parser does not have yet.

    Args:
        optional: True leaves options that are not given out of the namespace, and requires none.
        without: names of fields that are left out.
    """
    hints, known = get_type_hints(options), {action.dest for action in parser._actions}
    for field in dataclasses.fields(options):
        if field.name in known or field.name in without:
            continue
        kind, more = hints[field.name], dict(field.metadata.get("more", {}))
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(part for part in get_args(kind) if part is not type(None))
        help = field.metadata.get("help", "")
        if kind is bool:
            more["action"] = "store_true"
        elif get_origin(kind) is list:
            more |= {"action": "append", "type": get_args(kind)[0]}
        elif get_origin(kind) is Literal:
            more["choices"] = get_args(kind)
        else:
            more.setdefault("type", kind)
            if "choices" not in more:
                more.setdefault("metavar", {int: "N", float: "X"}.get(kind, "VALUE"))
            if field.default not in (MISSING, None) and not optional:
                help += " (default: %(default)s)"
        if optional:
            more["default"] = argparse.SUPPRESS
        elif field.default is MISSING:
            more["required"] = True
        else:
            more["default"] = field.default
        parser.add_argument(f"--{field.name}", help=help, **more)


def parse(options: type[Options], words: Sequence[str], **parser: Any) -> Options:
    """Return the options that the words of a command line give.

    Args:
        options: the dataclass of the options.
        parser: arguments of `argparse.ArgumentParser`.

    Raises:
        UsageError: an unknown, unfit or missing argument.
    """
    reader = Parser(**parser)
    add_options(reader, options)
    return options(**vars(reader.parse_args(list(words))))


def words(given: dict[str, Any]) -> list[str]:
    """Return options as the words of a command line; the variant's options are a dict under `options`."""
    result: list[str] = []
    for name, value in given.items():
        if name == "options":
            for key, setting in (value or {}).items():
                setting = str(setting).lower() if isinstance(setting, bool) else setting
                result += _word("option", f"{key}={setting}")
        elif value is True:
            result.append(f"--{name}")
        elif isinstance(value, dict):
            result += _word(name, json.dumps(value))
        elif isinstance(value, list):
            result += _word(name, ",".join(map(str, value)))
        elif value is not None and value is not False:
            result += _word(name, str(value))
    return result


def _word(name: str, value: str) -> list[str]:
    """A value that begins with - stands in one word with its name, or it would be taken for another option."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def command(stage: str, given: dict[str, Any]) -> str:
    """Return the command that runs a stage with these options."""
    return f"accelerate launch -m hf_attnswap.training {stage} {shlex.join(words(given))}"
