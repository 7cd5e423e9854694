"""Alignment: every swapped layer learns to reproduce the softmax output of its layer.

Teacher and student share one forward pass: where the model calls its attention, softmax runs as well, its result
flows on, and the variant is compared with it on the same query, key and value. No second model is in memory, layers
do not disturb each other, and only the variants' parameters get gradients (attention transfer of LoLCATs, Zhang 2024).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..patching import swapped_modules
from .batches import model_inputs
from .teacher import softmax_flows_on

DEFAULT_LEARNING_RATE = 1e-2  # as LoLCATs


class LayerLosses(dict[str, Tensor]):
    """Loss of each layer, by the path of its module, in the last forward pass: mean squared error over the variance of
    the softmax output."""

    def mean(self) -> Tensor:
        """The same weight for every layer."""
        return torch.stack(list(self.values())).mean()


@contextmanager
def aligning(model: nn.Module) -> Iterator[LayerLosses]:
    """While this is open, a forward pass runs softmax everywhere and fills the losses of the swapped layers.

    Call `losses.clear()` before the next forward pass.
    """
    losses = LayerLosses()

    def compare(layer, attention, teacher, query, key, value, mask, scaling):
        student = attention(query, key, value, mask, scaling)
        losses[layer] = losses.get(layer, 0) + normalised_error(student, teacher, mask.new_tokens())

    with softmax_flows_on(model, compare):
        yield losses


@torch.no_grad()
def calibrate(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> None:
    """Let every variant set its parameters from what its layer sees on a batch, as in `alignment_loss`.

    For the variants that know how (hybrids match the mass of their linear branch to softmax's outside the window);
    done once before the alignment, on the same batch in every process.
    """

    def show(layer, attention, teacher, query, key, value, mask, scaling):
        attention.calibrate(query, key, value, mask, scaling)

    device = next(model.parameters()).device
    with softmax_flows_on(model, show):
        model(
            **{
                name: x.to(device) if torch.is_tensor(x) else x
                for name, x in model_inputs(batch, last_logits_only=True).items()
            }
        )


def normalised_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """`|student - teacher|^2 / |teacher - its mean|^2`: 1 for a constant guess, 0 for equality.

    Of each text of the batch by itself, then their mean, so that it does not matter how texts are batched.
    student, teacher: `[B, H, T, Dv]`; valid: bool `[B, T]`, or None where all tokens count. Float32.
    """
    student, teacher = student.float(), teacher.float()
    count = torch.ones_like(teacher[:, :1, :, :1]) if valid is None else valid[:, None, :, None].float()
    tokens = count.expand_as(teacher).sum((1, 2, 3), keepdim=True).clamp(min=1)
    centre = (teacher * count).sum((1, 2, 3), keepdim=True) / tokens
    error = ((student - teacher).square() * count).sum((1, 2, 3))
    spread = ((teacher - centre).square() * count).sum((1, 2, 3))
    return (error / spread.clamp(min=1e-12)).mean()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model but for its variants, and return their parameters.

    Raises:
        UsageError: no variant of this model has parameters.
    """
    own = [p for attention in swapped_modules(model).values() for p in attention.parameters()]
    if not own:
        raise UsageError("the swapped attention has no parameters to align: fine-tune the model instead")
    model.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
    return own


def alignment_loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor], losses: LayerLosses) -> Tensor:
    """One forward pass inside `aligning`, and the mean of its losses over layers.

    Args:
        batch: token blocks `[B, n]` for a language model, or what the model takes by name, such as `input_ids` and
            `attention_mask` for an encoder.
    """
    losses.clear()
    model(**model_inputs(batch, last_logits_only=True))
    return losses.mean()
