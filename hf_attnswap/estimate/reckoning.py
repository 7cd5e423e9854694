"""Estimate a conversion: each stage of its training, and how it serves, beside the softmax that it had."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import NAME
from ..errors import UsageError
from ..integration.objectives import objective, require_positions
from ..integration.swapping import describe
from .devices import Device, seconds
from .layers import as_softmax, cache_bytes, layers_of
from .result import Estimate, Memory, Serving, Stage
from .steps import Training, aligned_parameters, aligning_step, distilling, finetuning, reading, weight_bytes, writes

USABLE = 0.95  # of the memory of a device; the rest is the program's and what lies between the tensors
_OF_TEXT = ("next tokens", "masked tokens", "labels", "vectors")


def estimate(
    model: PreTrainedModel,
    name: str,
    device: Device,
    *,
    tokens: int,
    length: int,
    num_devices: int = 1,
    batch_size: int = 1,
    gradient_checkpointing: bool = False,
    price_per_hour: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Estimate:
    """Estimate what a conversion needs, from shapes and the rates of a device.

    Args:
        model: swapped, on the meta device, in the dtype in which it trains and serves.
        name: of the model, for the result.
        tokens: tokens of each stage. length: tokens of a block, of a prompt, and of a text that is continued.
        num_devices: devices that share the work. batch_size: blocks per device and step.
        gradient_checkpointing: whether `distill` and `finetune` compute layers again in the backward pass.
        price_per_hour: of one device.
        say: called with what is going on.

    Raises:
        UsageError: the model does not read one text, is not swapped, cannot read as long a text, or cannot be counted.
    """
    if objective(model) not in _OF_TEXT:
        raise UsageError(f"a {type(model).__name__} does not read one text, so it cannot be estimated")
    if not getattr(model.config, NAME, None):
        raise UsageError("the model is not swapped: say what is swapped, such as --plan plan.yaml")
    require_positions(model, length, "--length")
    reckoner = _Reckoner(model, device, tokens, length, num_devices, batch_size, gradient_checkpointing, price_per_hour)
    try:
        stages, serving = reckoner.stages(say), reckoner.serving(say)
    except (NotImplementedError, RuntimeError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(f"a {type(model).__name__} cannot be counted without its weights: {first_line}") from error
    return Estimate(
        model=name,
        swapped=describe(model),
        parameters=sum(p.numel() for p in model.parameters()),
        device=device.name,
        num_devices=num_devices,
        device_memory=device.memory,
        dtype=str(model.dtype).removeprefix("torch."),
        length=length,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        tokens=tokens,
        price_per_hour=price_per_hour,
        stages=stages,
        serving=serving,
    )


class _Reckoner:
    def __init__(self, model, device, tokens, length, num_devices, batch_size, recompute, price_per_hour):
        self.model, self.device, self.tokens, self.length = model, device, tokens, length
        self.num_devices, self.batch_size, self.recompute = num_devices, batch_size, recompute
        self.price = price_per_hour
        self.reading = functools.cache(functools.partial(reading, model))
        swapped = layers_of(model)
        self.layers = {"softmax": as_softmax(swapped), "swapped": swapped}

    def stages(self, say: Callable[[str], None]) -> tuple[Stage, ...]:
        """Estimate every stage that can train the model; fine-tuning with softmax as well, as a control."""
        say("a step of align")
        new = aligned_parameters(self.model)
        whole = "the parameters of the variants" if new else "the attention modules"
        found = [self._stage("align", "swapped", whole, aligning_step(self.model, self.batch_size, self.length))]
        if writes(self.model):
            say("a step of distill")
            distilled = distilling(self.model, self.batch_size, self.length, self.recompute)
            found.append(self._stage("distill", "swapped", "all weights", distilled))
            say("a step of finetune")
            tuned = finetuning(self.model, self.batch_size, self.length, self.recompute)
            found += [self._stage("finetune", name, "all weights", tuned) for name in ("swapped", "softmax")]
        return tuple(found)

    def _stage(self, stage: str, attention: str, trains: str, training: Training) -> Stage:
        count, dtype = self.num_devices, self.model.dtype
        memory, sharded = self._memory(training)
        step = seconds(training.step, self.device, dtype)
        step += training.forwards * self._attention(attention, self.batch_size)
        step += self._attention(attention, self.batch_size, backward=True)
        step += training.softmaxes * self._attention("softmax", self.batch_size)
        if count > 1 and self.device.link:
            sent = 3 * training.weights if sharded else 2 * training.trained  # gathered twice and reduced once
            step = max(step, sent * (count - 1) / count / self.device.link)  # while computing
        rate = count * self.batch_size * self.length / step
        hours = self.tokens / rate / 3600
        return Stage(
            stage=stage,
            attention=attention,
            trains=trains,
            memory=memory,
            sharded=sharded,
            fits=memory.total <= USABLE * self.device.memory,
            step_s=step,
            tokens_per_s=rate,
            hours=hours,
            device_hours=hours * count,
            cost=None if self.price is None else hours * count * self.price,
        )

    def _memory(self, training: Training) -> tuple[Memory, bool]:
        """Return the memory of a device, and whether the weights have to be sharded."""
        beside = max(0, training.step.peak - training.trained)
        whole = Memory(training.weights, training.trained, training.optimiser, beside)
        if self.num_devices == 1 or whole.total <= USABLE * self.device.memory:
            return whole, False
        weights, gradients, optimiser = (
            -(-part // self.num_devices) for part in (whole.weights, whole.gradients, whole.optimiser)
        )
        return Memory(weights, gradients, optimiser, beside + largest_unit(self.model)), True

    def _attention(self, name: str, batch: int, backward: bool = False) -> float:
        return sum(
            count * self.device.attention(layer.attention, batch, self.length, layer.window, self.model.dtype, backward)
            for layer, count in self.layers[name]
        )

    def serving(self, say: Callable[[str], None]) -> tuple[Serving, ...]:
        """Estimate the reading of a prompt and the writing after it, with softmax and swapped."""
        say("a prompt")
        prompt = self.reading(1, self.length)
        body = seconds(prompt, self.device, self.model.dtype)
        found = []
        for name in ("softmax", "swapped"):
            say(f"serving with {name}")
            cache = cache_bytes(self.layers[name], self.length, self.model.dtype) if writes(self.model) else 0
            weights = self._weights(name)
            devices, most = self._room(weights, prompt.peak, cache)
            memory = Memory(weights, activations=prompt.peak, cache=cache)
            taken = body + self._attention(name, 1)
            found.append(self._serving("prefill", name, min(1, most), devices, memory, taken, self.length))
            for batch in sorted({min(1, most), most}) if writes(self.model) else ():
                memory = Memory(weights, activations=prompt.peak, cache=cache * max(1, batch))
                taken = self._step(name, max(1, batch))
                found.append(self._serving("decode", name, batch, devices, memory, taken, max(1, batch)))
        return tuple(found)

    def _weights(self, attention: str) -> int:
        """Return the bytes of the weights; softmax has none of its own."""
        own = sum(count * weight_bytes(layer.attention) for layer, count in self.layers["swapped"])
        return weight_bytes(self.model) - (own if attention == "softmax" else 0)

    def _room(self, weights: int, activations: int, cache: int) -> tuple[int, int]:
        """Return over how many devices a copy is spread, as few as hold one text, and how many texts they hold."""
        room = USABLE * self.device.memory
        needed = weights + activations + cache
        devices = max(1, -(-needed // int(room)))
        if devices > self.num_devices:
            return self.num_devices, 0
        return devices, int((devices * room - weights - activations) // cache) if cache else 1

    def _step(self, attention: str, batch: int) -> float:
        dtype = self.model.dtype
        return seconds(self.reading(batch, 1), self.device, dtype) + sum(
            count * self.device.step(layer.attention, batch, self.length, layer.window, dtype)
            for layer, count in self.layers[attention]
        )

    def _serving(self, work, attention, batch, devices, memory, taken, tokens) -> Serving:
        rate = tokens / taken * (self.num_devices // devices)
        cost = None if self.price is None else self.price * self.num_devices * 1e6 / rate / 3600
        return Serving(work, attention, batch, devices, memory, taken, rate, cost)


def largest_unit(model: nn.Module) -> int:
    """Return the bytes of the largest layer, or of an embedding, which a sharded model gathers to compute with it."""
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max((weight_bytes(unit) for unit in (*layers, *embeddings)), default=0)


def dtype_for(device: Device) -> torch.dtype:
    """Return in which dtype models train and serve on a device unless somebody says so."""
    return torch.float32 if device.name == "cpu" else torch.bfloat16
