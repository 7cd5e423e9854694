"""Say what a model does when it reads, writes and trains, by running it on the meta device, all but its attention."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..integration.objectives import objective
from ..training.align import aligning, aligning_projections, alignment_loss, projection_parameters, trainable_parameters
from ..training.distill import distillation_loss
from ..training.loop import next_token_loss
from ..training.recompute import recompute_layers
from ..training.teacher import frozen
from .layers import layers_of
from .standing_in import standing_in
from .trace import Trace, trace

ADAMW_STATES = 2  # numbers that it keeps for each that trains
# Passes over what trains: the norm of the gradients, clipping (2), and AdamW, which reads 4 tensors and writes 3.
UPDATE_PASSES = 10


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters of a module."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def writes(model: PreTrainedModel) -> bool:
    """Return whether a model predicts next tokens, so that it can write, be distilled and be fine-tuned."""
    return objective(model) == "next tokens"


def reading(model: PreTrainedModel, batch: int, length: int) -> Trace:
    """Return what a model does, all but its attention, to read texts for the first new token.

    Args:
        model: swapped, on the meta device.
    """
    inputs = _inputs(model, batch, length)

    def read():
        with torch.no_grad():
            model(**inputs)

    with standing_in(model):
        return trace(read)


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor | bool | int]:
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    if writes(model):
        return {"input_ids": tokens, "use_cache": False, "logits_to_keep": 1}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@dataclass(frozen=True)
class Training:
    """Hold what a step of a stage does and needs, on one device. The gradient of the new attention is computed once.

    Attributes:
        step: all but attention, AdamW included.
        weights: bytes of the weights, those of a teacher included. trained: bytes of the weights that train.
        softmaxes: how often softmax runs beside it, forward alone. forwards: how often the new attention does.
    """

    step: Trace
    weights: int
    trained: int
    softmaxes: int
    forwards: int = 1

    @property
    def optimiser(self) -> int:
        """Return the bytes that AdamW keeps."""
        return ADAMW_STATES * self.trained


def finetuning(model: PreTrainedModel, batch: int, length: int, recompute: bool = False) -> Training:
    """Return what a step of `finetune` does with all weights, by running it on the meta device.

    Args:
        recompute: whether layers are computed again in the backward pass (gradient checkpointing).
    """
    model, tokens = _trained(model, recompute), _inputs(model, batch, length)["input_ids"]
    found = _training(model, lambda: next_token_loss(model, tokens), softmaxes=0)
    return replace(found, forwards=1 + recompute)


def distilling(model: PreTrainedModel, batch: int, length: int, recompute: bool = False) -> Training:
    """Return what a step of `distill` does with all weights; arguments as in `finetuning`."""
    teacher = frozen(copy.deepcopy(model))
    model = _trained(model, recompute)
    inputs = {"input_ids": _inputs(model, batch, length)["input_ids"], "use_cache": False}
    found = _training(model, lambda: distillation_loss(model, teacher, inputs), teacher, softmaxes=1)
    return replace(found, forwards=1 + recompute)


def _trained(model: PreTrainedModel, recompute: bool) -> PreTrainedModel:
    model = copy.deepcopy(model)
    if recompute:
        recompute_layers(model)
    return model


def aligned_parameters(model: PreTrainedModel) -> bool:
    """Return whether `align` trains parameters of the variants alone; else it trains their whole attention modules."""
    return any(True for layer, _ in layers_of(model) for _ in layer.attention.parameters())


def aligning_step(model: PreTrainedModel, batch: int, length: int) -> Training:
    """Return what a step of `align` does, by running it on the meta device.

    The parameters of the variants train, or, where these have none, the attention modules around them.
    """
    model = copy.deepcopy(model)
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    given = tokens if writes(model) else {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if aligned_parameters(model):
        trainable_parameters(model)
        context, copies = aligning(model), 0
    else:
        own = projection_parameters(model)
        context, copies = aligning_projections(model), sum(p.numel() * p.element_size() for p in own)
    with context as losses:
        found = _training(model, lambda: alignment_loss(model, given, losses), softmaxes=1)
    return replace(found, weights=found.weights + copies)


def _training(
    model: PreTrainedModel,
    loss: Callable[[], Tensor],
    teacher: nn.Module | None = None,
    *,
    softmaxes: int,
) -> Training:
    with standing_in(model), standing_in(teacher) if teacher is not None else nullcontext():
        step = trace(lambda: loss().backward())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    step.move(UPDATE_PASSES * trained)
    weights = weight_bytes(model) + (0 if teacher is None else weight_bytes(teacher))
    return Training(step, weights, trained, softmaxes)
