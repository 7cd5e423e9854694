"""Time all arms by length; in a round the arms take turns, softmax first, so that they share the noise."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..benchmark.generation import run
from ..benchmark.measure import peak_memory_mib, seconds
from ..evaluation.likeness import logits_or_hidden
from ..integration.objectives import objective
from ..sources.files import write_whole
from ..sources.structured import read_json
from .arms import Settings
from .progress import Course, speed

# By length, a dict per round: what each arm took, or its error.
Rounds = dict[str, list[dict[str, dict[str, Any]]]]
WARM_UP = 32  # tokens


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    text_of: Callable[[int], Tensor],
    settings: Settings,
    path: Path,
    course: Course,
) -> Rounds:
    """Time prefill, decoding and, at the `train_lengths`, a training step of every model, and return all rounds.

    Of models that write no text the forward pass is timed in place of prefill and decoding.

    Every round is kept in a file, and rounds that the file holds are not run again.

    Args:
        models: models by label, softmax first.
        text_of: makes a prompt of a length, int64 `[length]`.
        path: the file that keeps the rounds, as JSON.
        course: gets the progress.

    Returns:
        By length a list of rounds. A round holds for each label the fields of `benchmark.generation.Run`, or
        `forward_s` and `peak_memory_mib`, and `train_s`, in seconds; or `error` and `train_error` in their place.
    """
    done: Rounds = read_json(path) if path.is_file() else {}
    for length in settings.lengths:
        rounds = done.setdefault(str(length), [])
        while len(rounds) < settings.rounds:
            found = {}
            for label, model in models.items():
                course.say(f"{label}: speed at {length} tokens, round {len(rounds) + 1} of {settings.rounds}")
                text = text_of(length)[None].to(model.device)
                found[label] = _one(model, text, settings, first=not rounds)
                course.advance(speed(settings, length))
            rounds.append(found)
            write_whole(path, json.dumps(done, indent=1).encode())
    return done


def _one(model: PreTrainedModel, text: Tensor, settings: Settings, first: bool) -> dict[str, Any]:
    """Time one model on one text; `error` and `train_error` replace the times that could not be measured."""
    short, found = text[:, :WARM_UP], {}
    try:
        if objective(model) == "next tokens":
            if first:  # what the first call allocates belongs to no length
                run(model, short, 1)
            found |= asdict(run(model, text, settings.decode_tokens))
        else:
            if first:
                forward(model, short)
            found |= forward(model, text)
    except Exception as error:  # whatever a model raises costs this length alone
        return {"error": (str(error).strip() or repr(error)).splitlines()[0]}
    if text.shape[1] in settings.train_lengths:
        try:
            if first:
                training_step(model, short)
            found["train_s"] = training_step(model, text)
        except Exception as error:
            found["train_error"] = (str(error).strip() or repr(error)).splitlines()[0]
    return found


@torch.no_grad()
def forward(model: nn.Module, tokens: Tensor) -> dict[str, float | None]:
    """Return the seconds of a forward pass, `forward_s`, and the MiB that it needs, `peak_memory_mib`.

    Args:
        tokens: int64 `[B, n]`, on the device of the model.
    """
    took: dict[str, float] = {}

    def timed() -> None:
        took["forward_s"] = seconds(lambda: model(input_ids=tokens), tokens.device)

    return {"peak_memory_mib": peak_memory_mib(timed, tokens.device), **took}


def training_step(model: nn.Module, tokens: Tensor) -> float:
    """Return the seconds of a training step: forward and backward pass of the language-modelling loss.

    Models that predict no next tokens take the mean square of what they return in its place. All parameters get
    gradients. The optimizer is left out: its time does not depend on the attention or the length.

    Args:
        tokens: int64 `[B, n]`, on the device of the model.
    """
    parameters = list(model.parameters())
    trained = [p.requires_grad for p in parameters]

    writes = objective(model) == "next tokens"

    def step() -> None:
        if not writes:
            logits_or_hidden(model(input_ids=tokens)).square().mean().backward()
            return
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    try:
        model.requires_grad_(True)
        with torch.enable_grad():
            return seconds(step, tokens.device)
    finally:
        for parameter, own in zip(parameters, trained, strict=True):
            parameter.requires_grad_(own)
            parameter.grad = None
