"""Define what a measured number is, from the measurement to the card: one Report, whatever was compared.

A trade-off, a comparison of classifiers and the quality of training runs are reports of one type; what differs are the
metrics that their arms carry. pydantic checks every value where it is made and where a file is read.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from ..statistics import FEW, MIN_ITEMS, Growth, Spread, lacking

STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def _writable(value: Any) -> Any:
    """Replace what UTF-8 cannot hold: a broken error message or file name may have lone surrogates."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _date(value: str) -> str:
    datetime.fromisoformat(value)
    return value


Text = Annotated[str, BeforeValidator(_writable)]
Name = Annotated[Text, Field(pattern=r"\S")]
Date = Annotated[Text, AfterValidator(_date)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Size = Annotated[int, Field(ge=1, le=10**18)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Kind = Literal["tradeoff", "classification", "quality"]
Verdict = Literal["better", "no measurable difference", "worse"]


@dataclass(config=STRICT)
class Model:
    """Describe the model whose attention was swapped."""

    name: Name
    parameters: Count
    attention_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    dtype: Text


@dataclass(config=STRICT)
class Machine:
    """Describe the machine on which the numbers were measured.

    Attributes:
        memory_gib: GiB. device: on which the model ran.
    """

    processor: Text
    cores: Count
    threads: Count
    memory_gib: Amount
    device: Text
    platform: Text


@dataclass(config=STRICT)
class Data:
    """Describe the data of training and evaluation.

    Attributes:
        training_size, evaluation_size: how many of `unit`.
        fingerprint: of the tokens or labels on which quality was measured.
    """

    training: Text
    training_size: Count
    evaluation: Text
    evaluation_size: Count
    unit: Literal["tokens", "texts", "images"] = "tokens"
    fingerprint: Text | None = None


@dataclass(config=STRICT)
class Comparison:
    """Hold a value of an arm beside that of the arm labelled `arm` on the same items, with its 95 % interval.

    low, high and verdict are None where the items are too few for an interval.
    """

    arm: Name
    value: float
    low: float | None
    high: float | None
    items: Size
    verdict: Verdict | None

    def __post_init__(self) -> None:
        _check_interval(self)
        if self.low is not None and self.items < MIN_ITEMS:
            raise ValueError(f"no interval: {lacking('it', MIN_ITEMS, 'items', self.items)}")

    @property
    def few(self) -> bool:
        """Return whether the interval rests on so few items that the interval is rough."""
        return self.items < FEW


def _check_interval(estimate: Any) -> None:
    if (estimate.low is None) != (estimate.high is None):
        raise ValueError("low and high together, or neither")
    if estimate.low is not None and not estimate.low <= estimate.value <= estimate.high:
        raise ValueError("low <= value <= high")


@dataclass(config=STRICT)
class Range:
    """Hold the mean negative log-likelihood over the positions `first` to `last` of a context."""

    first: Size
    last: Size
    nll: float


@dataclass(config=STRICT)
class Perplexity:
    """Hold the perplexity at one context; None where it is not finite.

    Attributes:
        context: tokens of a block. tokens: how many the mean is over.
        nll: mean negative log-likelihood of a token, nats.
        ratio: to the control that the kind of report names. against: ratios to other arms.
        word_perplexity, byte_perplexity: by word and byte of the text in place of token.
        block_nll: of every block, where reports are to be paired with later ones.

    Raises:
        ValueError: a ratio without a perplexity, or a ratio that is not above 0.
    """

    context: Size
    perplexity: Positive | None
    nll: float | None
    standard_error: Amount | None
    tokens: Count
    ratio: Comparison | None = None
    against: list[Comparison] = Field(default_factory=list)
    word_perplexity: Positive | None = None
    byte_perplexity: Positive | None = None
    by_position: list[Range] = Field(default_factory=list)
    block_nll: list[float] = Field(default_factory=list)

    def __post_init__(self) -> None:
        if self.perplexity is None and self.ratio is not None:
            raise ValueError("no ratio, since perplexity is null")
        if self.ratio and self.ratio.value <= 0:
            raise ValueError("a ratio above 0")


@dataclass(config=STRICT)
class Metric:
    """Hold a metric of a task over its items, accuracy among them.

    Attributes:
        low, high: the 95 % interval of `value`.
        difference, ratio: to softmax. against: differences to other arms.
    """

    task: Name
    metric: Name
    higher_is_better: bool
    value: float | None
    standard_error: Amount | None
    items: Size
    low: float | None = None
    high: float | None = None
    by_seed: list[float] = Field(default_factory=list)
    difference: Comparison | None = None
    ratio: Comparison | None = None
    against: list[Comparison] = Field(default_factory=list)

    def __post_init__(self) -> None:
        if self.value is not None:
            _check_interval(self)


@dataclass(config=STRICT)
class Speed:
    """Hold time and memory at one length; a speed-up is over softmax in the same rounds.

    Attributes:
        length: tokens.
        prefill_s, forward_s: seconds of a prefill or a forward pass.
        train_s: seconds of a forward and a backward pass.
        peak_memory_mib, cache_mib: MiB.
        note: why there is no time, where there is none.

    Raises:
        ValueError: neither a time nor a note.
    """

    length: Size
    prefill_s: Spread | None = None
    prefill_speedup: Spread | None = None
    decode_tokens_per_s: Spread | None = None
    decode_speedup: Spread | None = None
    train_s: Spread | None = None
    train_speedup: Spread | None = None
    forward_s: Spread | None = None
    forward_speedup: Spread | None = None
    peak_memory_mib: Amount | None = None
    cache_mib: Amount | None = None
    note: Text | None = None

    def __post_init__(self) -> None:
        if self.prefill_s is None and self.forward_s is None and not (self.note or "").strip():
            raise ValueError("a note with the reason, since no time was measured")


@dataclass(config=STRICT)
class Stage:
    """Describe a stage of training; what was not recorded is None.

    Attributes:
        size: how many of `Data.unit`.
    """

    stage: Name
    trains: Text
    text: Text
    size: Count | None
    steps: Count | None
    learning_rate: Amount | None
    first_loss: float | None = None
    last_loss: float | None = None
    seconds: Amount | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)


@dataclass(config=STRICT)
class Alignment:
    """Describe the alignment that a trade-off itself gave an arm."""

    tokens: Count
    seconds: Amount
    first_loss: float
    last_loss: float


@dataclass(config=STRICT)
class CurvePoint:
    """Hold the perplexity on the validation text of a run after so many tokens of training."""

    tokens: Count
    perplexity: Positive


@dataclass(config=STRICT)
class Group:
    """Describe what of one kind has one attention: whole layers, and key/value groups of other layers ("18.2")."""

    attention: Name
    options: dict[str, Any]
    layers: list[Count]
    kind: Name = "causal"
    groups: list[Name] = Field(default_factory=list)


@dataclass(config=STRICT)
class Check:
    """Hold the outcome of a check of the swap itself; worst is None where nothing could be compared."""

    name: Name
    passed: bool
    worst: Amount | None
    limit: Amount


@dataclass(config=STRICT)
class Scale:
    """Hold the root mean square of a layer's output over that of softmax, at the positions `first` to `last`."""

    first: Size
    last: Size
    scale: Amount | None


@dataclass(config=STRICT)
class Gradient:
    """Hold norms of the gradients in a layer."""

    query: Amount | None
    key: Amount | None
    value: Amount | None
    layer_input: Amount | None


@dataclass(config=STRICT)
class Layer:
    """Describe what a swapped layer does, beside the softmax that it replaces (see `evaluation.diagnose`).

    Numbers are means over heads and rows of a sample; `by_head` has them by head.

    Attributes:
        layer, index: name of the module, and the number by which `swap(layers=...)` counts it.
        kl, kl_error: divergence of the model's next-token distribution when this layer alone is swapped, nats, and its
            standard error.
        perplexity_ratio: to the model with softmax, when this layer alone is swapped.
        dead: share of the allowed weights that are exactly 0. saturated: share of the others through which hardly any
            gradient passes; None for variants that do not act on scores.
        row_sum, row_sum_spread: mean and standard deviation of the sum of a row's weights.
        negative: share of the mass of the weights that is negative.
        entropy: of the weights, nats. effective_keys: its exponential.
        sparsity: share of the allowed keys with less than a hundredth of an equal part.
        distance: half of the summed differences to the weights of softmax.
        output_scale: size of the output over that of softmax, by position.
    """

    layer: Name
    kl: float | None
    perplexity_ratio: Positive | None
    gradient: Gradient
    gradient_of_softmax: Gradient
    index: Count | None = None
    kl_error: Amount | None = None
    dead: Amount | None = None
    saturated: Amount | None = None
    saturated_of_softmax: Amount | None = None
    row_sum: float | None = None
    row_sum_spread: Amount | None = None
    negative: Amount | None = None
    entropy: Amount | None = None
    effective_keys: Amount | None = None
    sparsity: Amount | None = None
    distance: Amount | None = None
    softmax_entropy: Amount | None = None
    softmax_effective_keys: Positive | None = None
    softmax_sparsity: Amount | None = None
    output_scale: list[Scale] = Field(default_factory=list)
    by_head: dict[str, list[float | None]] = Field(default_factory=dict)


@dataclass(config=STRICT)
class Diagnostics:
    """Hold measurements of the swapped layers of an arm.

    Attributes:
        layers_by_damage: numbers of the layers, the least damaged first.
    """

    context: Size
    tokens: Size
    layers: list[Layer]
    layers_by_damage: list[Count] = Field(default_factory=list)
    attention: Text = ""
    perplexity: Positive | None = None
    gradient_at_first_layer: Amount | None = None


@dataclass(config=STRICT)
class Control:
    """Name what an arm with a state must beat: a plain window that keeps as much, or that takes as long.

    Attributes:
        equal: what both have in common at the longest length: the bytes of the cache, or the time of the prefill.
        arm: label of the control; None where there is none.
        note: why it is no window, or none that was trained alike.
    """

    equal: Literal["state", "time"]
    arm: Name | None
    note: Text | None = None

    def __post_init__(self) -> None:
        if self.arm is None and not (self.note or "").strip():
            raise ValueError("a note with the reason, since there is no control")


@dataclass(config=STRICT)
class Arm:
    """Hold one row of a comparison: an attention, how it was trained, and all that was measured of it.

    Attributes:
        label: unique in the report.
        controls: the arms of equal state and of equal time that it must beat.
        new_parameters: how many parameters the swap adds.
        reason: why nothing was measured, unless status is "measured".
        curve: perplexity during training. conversion: name of the converted model, where the arm is one.
        backends: by op, which of its forms ran while the perplexity was measured.

    Raises:
        ValueError: no reason, a perplexity that is not finite in a measured arm, or an entry that is there twice.
    """

    label: Name
    attention: Name
    options: dict[str, Any]
    control: bool
    formula: Text
    cost: Text
    cost_class: Literal["quadratic", "linear", "constant"]
    source: Text
    new_parameters: Count
    status: Literal["measured", "failed", "not measured"]
    reason: Text | None = None
    controls: list[Control] = Field(default_factory=list)
    swapped: list[Group] = Field(default_factory=list)
    alignment: Alignment | None = None
    training: list[Stage] = Field(default_factory=list)
    training_tokens: Count = 0
    training_seconds: Amount | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    conversion: Name | None = None
    backends: dict[str, list[Name]] = Field(default_factory=dict)
    checks: list[Check] = Field(default_factory=list)
    growth: dict[str, Growth] = Field(default_factory=dict)
    diagnostics: Diagnostics | None = None
    perplexity: list[Perplexity] = Field(default_factory=list)
    metrics: list[Metric] = Field(default_factory=list)
    speed: list[Speed] = Field(default_factory=list)

    def __post_init__(self) -> None:
        if self.status != "measured" and not (self.reason or "").strip():
            raise ValueError(f"a reason, since status is {self.status!r}")
        if self.status == "measured" and any(entry.perplexity is None for entry in self.perplexity):
            raise ValueError("finite perplexities, since status is 'measured'")
        _check_unique("perplexity.context", [entry.context for entry in self.perplexity])
        _check_unique("speed.length", [entry.length for entry in self.speed])
        _check_unique("metrics", [f"{entry.metric} of {entry.task}" for entry in self.metrics])


def _check_unique(what: str, values: list[Any]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"every {what} once, {twice!r} is there twice")


@dataclass(config=STRICT)
class Report:
    """Hold a comparison of arms on one model.

    Attributes:
        settings: what else the command was given, as plain data.
    """

    kind: Kind
    title: Name
    model: Model
    machine: Machine
    versions: dict[str, Text]
    date: Date
    command: Text
    seeds: list[int]
    data: Data
    arms: Annotated[list[Arm], Field(min_length=1)]
    settings: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_unique("arms.label", [arm.label for arm in self.arms])
