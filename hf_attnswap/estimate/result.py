"""Hold an estimate: plain data, which `--json` prints."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Hold the bytes that a device needs at the peak; the parts add up to it.

    Attributes:
        weights: of the model, and of its teacher where there is one. gradients: of what trains.
        optimiser: what AdamW keeps.
        activations: what the peak needs beside the others, layers that are gathered from other devices included.
        cache: keys and values, and states.
    """

    weights: int
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """Return the sum of the parts."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.cache


@dataclass(frozen=True)
class Stage:
    """Estimate a stage of training.

    Attributes:
        stage: "align", "distill" or "finetune". attention: "softmax" or "swapped".
        trains: what trains, in words.
        memory: of each device. sharded: whether weights, gradients and optimiser are sharded over the devices (FSDP),
            as a whole copy does not fit. fits: whether the memory suffices.
        step_s: seconds of a step, in which each device takes one batch.
        tokens_per_s: of all devices together. hours: of the whole stage. device_hours: of all devices together.
        cost: device hours times the price of one; None without a price.
    """

    stage: str
    attention: str
    trains: str
    memory: Memory
    sharded: bool
    fits: bool
    step_s: float
    tokens_per_s: float
    hours: float
    device_hours: float
    cost: float | None


@dataclass(frozen=True)
class Serving:
    """Estimate how a model serves.

    Attributes:
        work: "prefill", a prompt that is read, or "decode", one more token for each text of a batch.
        attention: "softmax" or "swapped".
        batch: texts at a time; 0 where not even one fits, and all that follows is then of one text.
        devices: those over which the layers of one copy of the model are spread, one after the other.
        memory: of all devices of a copy together.
        seconds: of the prompt, or of a step.
        tokens_per_s: of all copies together.
        cost: of a million tokens; None without a price.
    """

    work: str
    attention: str
    batch: int
    devices: int
    memory: Memory
    seconds: float
    tokens_per_s: float
    cost: float | None


@dataclass(frozen=True)
class Estimate:
    """Estimate a conversion.

    Attributes:
        model, swapped: the model, and what is swapped in it, in words. parameters: of the swapped model.
        device: its name. num_devices: how many there are. device_memory: bytes of each.
        dtype: of weights, gradients and optimiser. length: tokens of a block, a prompt, and a text that is continued.
        batch_size: blocks per device and step. gradient_checkpointing: whether layers are computed again.
        tokens: of each stage. price_per_hour: of a device.
        stages, serving: what is estimated.
    """

    model: str
    swapped: str
    parameters: int
    device: str
    num_devices: int
    device_memory: int
    dtype: str
    length: int
    batch_size: int
    gradient_checkpointing: bool
    tokens: int
    price_per_hour: float | None
    stages: tuple[Stage, ...]
    serving: tuple[Serving, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as plain data, the memory in bytes with its total."""
        content = asdict(self)
        for name in ("stages", "serving"):
            for plain, entry in zip(content[name], getattr(self, name), strict=True):
                plain["memory"]["total"] = entry.memory.total
        return content
