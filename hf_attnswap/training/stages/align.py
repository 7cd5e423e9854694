"""Align a swapped model: each swapped layer learns to reproduce the softmax output of its layer.

Softmax and the new attention share one forward pass; only the new attention's own parameters train. With
--train attention its projections train too, in full or as LoRA, and whole attention modules are compared: for variants
that have no parameters, such as relu_norm. Those take --option gain=true, a learned factor per head.

    accelerate launch -m hf_attnswap.training align --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --attention hedgehog+window --train_file book.txt --max_train_tokens 500000 --output_dir aligned
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UsageError
from ...integration.swapping import swapped_modules
from ..align import (
    DEFAULT_LEARNING_RATE,
    DEFAULT_PROJECTIONS_LEARNING_RATE,
    aligning,
    aligning_projections,
    alignment_loss,
    calibrate,
    projection_parameters,
    trainable_parameters,
)
from ..lora import with_lora
from ..options import LoraOptions, argument
from ..run import swap_as_asked
from ..stage import Stage


@dataclass(kw_only=True)
class Align(LoraOptions, Stage):
    """Each swapped layer learns the softmax output of its layer."""

    name: ClassVar[str] = "align"
    # FSDP gathers a layer's parameters for the backward pass of its output; these losses arise inside the layer.
    fsdp: ClassVar[str | None] = "it trains few parameters, so launch with distributed_type: MULTI_GPU"

    learning_rate: float = argument(
        DEFAULT_LEARNING_RATE,
        f"highest learning rate of AdamW; papers have {DEFAULT_PROJECTIONS_LEARNING_RATE:g} for --train attention",
    )
    train: Literal["new", "attention"] = argument(
        "new", "the new parameters, or the attention modules with their projections"
    )
    linear_branch_alone: bool = argument(
        False, "of X+window train the linear variant X, without the window: a first stage before the whole"
    )
    weights_loss: float = argument(
        0.0,
        "factor of the cross-entropy of the attention weights, beside the error of the outputs; O(n^2), for variants "
        "without negative weights",
    )

    def trains(self) -> str:
        if self.linear_branch_alone:
            return "the parameters of the linear variant, without its window"
        if self.train == "new":
            return "the parameters of the variant"
        return "the attention modules" + (", their projections by LoRA" if self.use_lora else "")

    def moves_the_original(self) -> bool:
        return self.train == "attention"

    def prepare(self, model: PreTrainedModel, blocks: Tensor, accelerator: Accelerator) -> nn.Module:
        if not swapped_modules(model) or self.attention or self.layers or self.option:
            swap_as_asked(model, self, accelerator, self.attention or "hedgehog+window")
            calibrate(model, blocks[:2].long())
        if self.train == "new":
            if self.use_lora:
                raise UsageError("--use_lora is for the projections, which --train attention trains")
            trainable_parameters(model, self.linear_branch_alone)
            return model
        if self.linear_branch_alone:
            raise UsageError("--linear_branch_alone compares no whole attention modules, as --train attention does")
        if self.weights_loss:
            raise UsageError("--weights_loss compares weights on the same queries, which --train attention changes")
        projection_parameters(model)
        return with_lora(model, self, accelerator)

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        if self.train == "new":
            observing = aligning(model, self.linear_branch_alone, self.weights_loss)
        else:
            observing = aligning_projections(model)
        with observing as self._layer_losses:
            yield

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return alignment_loss(model, batch, self._layer_losses)

    def finish(self, model: nn.Module, blocks: Tensor) -> None:
        if self.linear_branch_alone:  # the branch has another mass now
            calibrate(model, blocks[:2].long())
