"""Find what an arm with a state must beat: the plain windows of the same cache bytes, and of the same prefill time.

A linear branch beside a window keeps more than that window and takes longer. Whether it is worth that, only a window
says that may keep as much, or take as long. Both are found at the longest length, on the attention of all layers alone:
the rest of the model is the same for all arms.
"""

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import attentions
from ..attentions import Attention, Heads
from ..attentions.groups import Groups
from ..benchmark.attention import Variant, random_inputs
from ..benchmark.measure import interleaved
from ..config import NAME
from ..integration.finding import inspect
from ..integration.heads import heads_of
from ..integration.objectives import objective
from ..integration.swapping import swapped_modules
from ..plans import layers_in
from ..report.types import Control
from ..sources.files import write_whole
from ..sources.structured import read_json
from .arms import Arm, build

SOFTMAX, WINDOW = "softmax", "window"
STEP = 16  # windows of equal time are multiples of it
ROUNDS = 5  # of timings of one window
CLOSE = 0.05  # a window that keeps so nearly as many keys is the same control


# What runs one layer, and how many layers take as long as it.
Runs = list[tuple[Callable[[], Any], int]]


@dataclass(frozen=True)
class Where:
    """Say in which layers and groups the controls of an arm stand.

    Attributes:
        layers, keep: as `SwapConfig` takes them.
        places: layers and groups by themselves, in place of `layers` and `keep`; None where these say it.
    """

    layers: Any = None
    keep: Any = None
    places: list[str] | None = None


@dataclass(frozen=True)
class Layers:
    """Hold the attention of all layers of a model with inputs of one length, layers that are alike as one.

    Layers whose groups run the same variants are alike, whichever group runs which.

    Attributes:
        each: attention, its query, key and value, and how many layers are like it.
    """

    each: list[tuple[Attention, tuple[Tensor, Tensor, Tensor], int]]

    @classmethod
    def of(cls, model: PreTrainedModel, length: int) -> "Layers":
        """Return the causal attention of a model at `length` tokens of random inputs.

        Raises:
            ValueError: the heads of a layer cannot be read.
        """
        found: dict[tuple[Heads, str], list[Attention]] = {}
        for entry in inspect(model):
            if entry.kind != "causal" or entry.reason is not None:
                continue
            heads = heads_of(entry.module)
            if heads is None:
                raise ValueError(f"the heads of {entry.name} cannot be read")
            attention = getattr(entry.module, NAME, None) or attentions.get(SOFTMAX)(heads)
            chosen = attention.choice()
            alike = str(sorted(map(str, chosen.values())) if isinstance(chosen, dict) else chosen)
            found.setdefault((heads, alike), []).append(attention)
        shapes = {heads for heads, _ in found}
        inputs = {heads: random_inputs(heads, length, dtype=model.dtype, device=model.device) for heads in shapes}
        return cls([(alike[0], inputs[heads], len(alike)) for (heads, _), alike in found.items()])

    def runs(self) -> "Runs":
        """Return what runs one layer of each sort, and how many layers are of it."""

        def runs(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
            return torch.no_grad()(lambda: Variant(attention)(*inputs))

        return [(runs(attention, inputs), count) for attention, inputs, count in self.each]

    @torch.no_grad()
    def cache_bytes(self) -> int:
        """Return the bytes of the states, or of keys and values, of all layers after the inputs."""
        total = 0
        for attention, inputs, count in self.each:
            kept = Variant(attention).state(*inputs).values() if attention.stateful else inputs[1:]
            total += count * sum(t.numel() * t.element_size() for t in kept)
        return total


def with_equal_controls(
    arms: Sequence[Arm], model: PreTrainedModel, length: int, path: Path, say: Callable[[str], None]
) -> tuple[list[Arm], dict[str, list[Control]]]:
    """Return the arms, each after the controls of equal state and time that it lacks, and the controls by label.

    Arms with a state have such controls, unless all that they swap are controls: a window has none, but a window that
    leaves some groups on softmax has that of all groups. An arm that was trained has a control trained alike where one
    of the arms is that; else an untrained one, which its note says.

    Args:
        model: the model that is compared, not swapped.
        length: tokens at which state and time are equal, the longest length of the comparison.
        path: the JSON file that keeps what was found, so that a run that goes on has the same arms.
        say: called with a line of text for each arm.
    """
    known: dict[str, list[dict[str, Any]]] = read_json(path) if path.is_file() else {}
    made, told = list(arms), {}
    for arm in arms if objective(model) == "next tokens" else ():
        if arm.label not in known:
            say(f"{arm.label}: controls of equal state and time")
            known[arm.label] = _found(arm, model, length)
            write_whole(path, json.dumps(known, indent=1).encode())
        told[arm.label] = [_resolved(arm, entry, made) for entry in known[arm.label]]
    return made, {label: controls for label, controls in told.items() if controls}


def _found(arm: Arm, model: PreTrainedModel, length: int) -> list[dict[str, Any]]:
    """Return what `equal_windows` returns; the reason where that fails, which takes nothing else along."""
    try:
        swapped = build(arm, model)
        return equal_windows(arm, swapped, model, length) if has_controls(swapped) else []
    except Exception as error:
        if os.environ.get("ATTNSWAP_DEBUG"):
            raise
        reason = f"not found: {(str(error).strip() or repr(error)).splitlines()[0]}"
        return [{"equal": equal, "note": reason} for equal in ("state", "time")]


def has_controls(model: PreTrainedModel) -> bool:
    """Return whether something in a model keeps a state and is no control, or a window stands in some groups alone."""
    layers = list(swapped_modules(model).values())
    parts = [part for layer in layers for part in (layer.parts if isinstance(layer, Groups) else [layer])]
    parted = any(isinstance(layer, Groups) for layer in layers)
    return any(part.stateful and (not part.control or (parted and part.name == WINDOW)) for part in parts)


def equal_windows(arm: Arm, swapped: PreTrainedModel, model: PreTrainedModel, length: int) -> list[dict[str, Any]]:
    """Return the windows of equal state and of equal time, as JSON values.

    Args:
        arm: an arm with a state. swapped: its model.
        model: the model that is compared, not swapped.
        length: tokens.

    Returns:
        Dicts of `equal` with `window`, `sinks` and `where`; or, where no window of that state or time makes sense, with
        `note`, and with `arm` where softmax is the control in its stead.
    """
    told = {"sinks": _sinks(arm), "where": asdict(where(arm, swapped))}

    def window_of(window: int) -> Layers:
        return Layers.of(build(control(arm, told | {"window": window}), model), length)

    ours, softmax = Layers.of(swapped, length), Layers.of(model, length)
    bytes_, sinks = ours.cache_bytes(), told["sinks"]
    state = equal_state(bytes_, lambda window: window_of(window).cache_bytes(), length, sinks)
    time = equal_time(ours.runs(), lambda window: window_of(window).runs(), softmax.runs(), length, model.device)
    found = {"state": state, "time": time}
    return [{"equal": e} | (w if isinstance(w, dict) else {"window": w} | told) for e, w in found.items()]


def equal_state(ours: int, bytes_of: Callable[[int], int], length: int, sinks: int = 0) -> int | dict[str, str]:
    """Return the window whose cache has as many bytes as ours; or, as `equal_windows` does, why there is none.

    Args:
        ours: bytes of the cache after `length` tokens. bytes_of: makes those of a window from its size.
    """
    one, two = bytes_of(1), bytes_of(2)
    window = 1 + round((ours - one) / (two - one)) if two > one else length
    if window < 1:
        return {"note": "its state is smaller than that of a window of one token and the sinks"}
    if window + sinks >= length:
        return {"arm": SOFTMAX, "note": f"a window of its state would hold all {length:,} tokens, as softmax does"}
    return window


def equal_time(
    ours: Runs, window_of: Callable[[int], Runs], softmax: Runs, length: int, device: torch.device | str = "cpu"
) -> int | dict[str, str]:
    """Return the window that takes as long as ours, of the multiples of 16; or, as `equal_windows` does, why not.

    The range is halved between a window that is faster than ours and one that is slower; each takes turns with ours.

    Args:
        ours, softmax: the attention of the arm, and softmax, over `length` tokens.
        window_of: makes the same for a window from its size.
    """

    def times_as_long(other: Runs) -> float:
        both = {"ours": ours, "other": other}
        turns = {f"{name} {at}": run for name, runs in both.items() for at, (run, _) in enumerate(runs)}
        took = interleaved(turns, ROUNDS, device)

        def whole(name: str, runs: Runs) -> float:
            return sum(count * statistics.median(took[f"{name} {at}"]) for at, (_, count) in enumerate(runs))

        return whole("other", other) / whole("ours", ours)

    if times_as_long(softmax) <= 1:
        return {"arm": SOFTMAX, "note": f"its attention is no faster than softmax at {length:,} tokens"}
    low, high = 1, max(1, length // STEP)  # in steps
    tried = {steps: times_as_long(window_of(steps * STEP)) for steps in dict.fromkeys((low, high))}
    if tried[low] > 1:
        return {"note": f"its attention is faster than a window of {STEP} at {length:,} tokens"}
    if tried[high] < 1:
        return {"arm": SOFTMAX, "note": f"a window of its time would hold all {length:,} tokens, as softmax does"}
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = times_as_long(window_of(middle * STEP))
        low, high = (middle, high) if tried[middle] < 1 else (low, middle)
    return STEP * min((low, high), key=lambda steps: max(tried[steps], 1 / tried[steps]))


def _sinks(arm: Arm) -> int:
    return arm.options.get("sinks", attentions.get(WINDOW).options()["sinks"].default)


def where(arm: Arm, swapped: PreTrainedModel) -> Where:
    """Return where the controls of an arm stand: where its variants do, and of a window in some groups, in all groups.

    Args:
        swapped: the model of the arm.
    """
    parts = (getattr(swapped.config, NAME, None) or {}).get("swapped") or []
    told = not isinstance(arm.layers, Mapping)
    if all(part["attention"] == WINDOW for part in parts):
        return Where(arm.layers if told else sorted({layer for part in parts for layer in layers_in(part)}))
    if told and (arm.conversion is None or not any(part.get("groups") for part in parts)):
        return Where(arm.layers, arm.keep)
    return Where(places=[str(place) for part in parts for place in (*part["layers"], *part.get("groups", ()))])


def control(arm: Arm, found: Mapping[str, Any]) -> Arm:
    """Return the window that is a control of `arm`.

    Args:
        found: its `window` and `sinks`, and `where` it stands, as `equal_windows` returns them.
    """
    options, stands = {key: found[key] for key in ("window", "sinks")}, Where(**found["where"])
    usual = attentions.get(WINDOW).options()
    said = [f"{key}={value}" for key, value in options.items() if key == "window" or value != usual[key].default]
    if stands.layers is not None:
        said.append(f"layers={stands.layers if isinstance(stands.layers, str) else json.dumps(stands.layers)}")
    label, layers = f"window:{','.join(said)}", stands.layers
    if stands.places is not None:
        layers = {place: {"attention": WINDOW, **options} for place in stands.places}
    if stands.places is not None or stands.keep is not None:
        label += f" in the groups of {arm.label}"
    return Arm(label, WINDOW, options, layers, stands.keep, is_control=True)


def _resolved(arm: Arm, found: dict[str, Any], arms: list[Arm]) -> Control:
    """Return a control as the report has it; where it is none of the arms, put it before its arm."""
    if "window" not in found:
        return Control(found["equal"], found.get("arm"), found["note"])
    made, training = control(arm, found), _training(arm)
    alike = [other for other in arms if other is not arm and _is_same(other, made)]
    best, note = next((other for other in alike if _training(other) == training), None), None
    if best is None:
        tokens = sum(count or 0 for _, count, _ in training)
        note = f"it is untrained, the arm was trained on {tokens:,} tokens: compare one that the same recipe trained"
        best = next((other for other in alike if not _training(other)), None)
    if best is None:
        best = made
        arms.insert(next(place for place, other in enumerate(arms) if other is arm), made)
    return Control(found["equal"], best.label, note if training else None)


def _training(arm: Arm) -> list[tuple[Any, Any, Any]]:
    """Return stage, tokens and seed of each stage of a conversion but alignment, which a window needs none of."""
    stages = [stage for stage in (arm.conversion.training if arm.conversion else ()) if stage["stage"] != "align"]
    return [(stage["stage"], stage["tokens"], stage["arguments"].get("seed")) for stage in stages]


def _is_same(arm: Arm, made: Arm) -> bool:
    """Return whether an arm is a window in the same places that keeps as many keys, or nearly."""
    same = arm.attention == WINDOW and (arm.layers, arm.keep) == (made.layers, made.keep)
    return same and is_close(arm.options, made.options)


def is_close(options: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether windows of two `window` and `sinks` keep as many keys, or nearly."""
    ours, theirs = (given.get("window", 0) + given.get("sinks", 0) for given in (options, wanted))
    return abs(ours - theirs) <= CLOSE * theirs
