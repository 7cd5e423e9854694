"""Align a swapped model: each swapped layer learns to reproduce the softmax output of its layer.

Any model that reads text is aligned and keeps its class: causal and masked language models, encoders, classifiers.
Softmax and the new attention share one forward pass; only the new attention's own parameters train. With
--train attention its projections train too, in full or as LoRA, and whole attention modules are compared: for variants
that have no parameters, such as relu_norm. Those take --option gain=true, a learned factor per head.

    accelerate launch -m hf_attnswap.training align --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --attention hedgehog+window --train_file book.txt --max_train_tokens 500000 --output_dir aligned
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import PreTrainedModel

from ...config import NAME
from ...errors import UsageError
from ...integration.swapping import swapped_modules
from ...launch import say
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
from ..loading import predicts_next_tokens, require_text
from ..lora import with_lora
from ..options import LoraOptions, argument
from ..run import swap_as_asked
from ..stage import Stage

EXACT = 1e-4  # the error of a layer, as `training.align.text_errors` has it, below which it has nothing to learn


@dataclass(kw_only=True)
class Align(LoraOptions, Stage):
    """Each swapped layer learns the softmax output of its layer."""

    name: ClassVar[str] = "align"
    fsdp1: ClassVar[str | None] = "which gathers parameters for the backward pass of a whole layer alone"

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

    def require(self, model: PreTrainedModel) -> None:
        require_text(model, self.model_name_or_path)
        if self.separate_documents and not predicts_next_tokens(model):
            raise UsageError(
                f"--separate_documents is for models that predict next tokens, and {self.model_name_or_path!r} is a "
                f"{type(model).__name__}: leave it out"
            )

    def prepare(self, model: PreTrainedModel, blocks: Tensor, accelerator: Accelerator) -> nn.Module:
        self._fsdp2 = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
        if self._fsdp2 is not None:
            self._require_fsdp2_fits(self._fsdp2)
        # What others than causal language models are told by name; the output of their heads is not needed.
        known = inspect.signature(model.forward).parameters
        self._told = None if predicts_next_tokens(model) else {"use_cache": False} if "use_cache" in known else {}
        if swap_as_asked(model, self, accelerator, None if swapped_modules(model) else "hedgehog+window"):
            self._calibrate(model, blocks)
        if self.train == "new":
            if self.use_lora:
                raise UsageError("--use_lora is for the projections, which --train attention trains")
            trainable_parameters(model, self.linear_branch_alone)
            self._leave_exact(model, blocks, accelerator)
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
        with _gathered_alone(self._fsdp2, model, self.train == "attention"), observing as self._layer_losses:
            yield

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return alignment_loss(model, self._inputs(batch), self._layer_losses)

    def finish(self, model: nn.Module, blocks: Tensor) -> None:
        if self.linear_branch_alone:  # the branch has another mass now
            self._calibrate(model, blocks)

    def _require_fsdp2_fits(self, plugin: FullyShardedDataParallelPlugin) -> None:
        """Raise UsageError where FSDP2 would not gather what the losses of this stage need."""
        if getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy) is not transformer_auto_wrap_policy:
            raise UsageError("align under FSDP2 needs fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP")
        if plugin.cpu_ram_efficient_loading:
            raise UsageError("align under FSDP2 looks at the model first: set fsdp_cpu_ram_efficient_loading: false")
        for option in ("linear_branch_alone", "weights_loss"):
            if getattr(self, option):
                raise UsageError(
                    f"--{option} does not work under FSDP2, which gathers parameters for the output of a variant "
                    "alone: launch with distributed_type: MULTI_GPU"
                )

    def _leave_exact(self, model: nn.Module, blocks: Tensor, accelerator: Accelerator) -> None:
        """Freeze the variants of layers whose output is that of softmax already.

        Adam's steps do not become small with the gradient, so they would lead away from there.

        Raises:
            UsageError: this is so in every layer.
        """
        with torch.no_grad(), aligning(model, self.linear_branch_alone, self.weights_loss) as losses:
            alignment_loss(model, self._inputs(blocks[:1].long().to(next(model.parameters()).device)), losses)
        exact = [path for path, loss in losses.items() if loss < EXACT]
        for path in exact:
            model.get_submodule(path).get_submodule(NAME).requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(f"the output of every swapped layer is within {EXACT:g} of softmax's: nothing to align")
        if exact:
            say(accelerator, f"{len(exact)} layers are within {EXACT:g} of softmax, and stay as they are")

    def _inputs(self, batch: Tensor) -> Tensor | dict[str, Any]:
        if self._told is None:
            return batch
        return {"input_ids": batch, "attention_mask": torch.ones_like(batch), **self._told}

    def _calibrate(self, model: nn.Module, blocks: Tensor) -> None:
        few = blocks[: 2 if self._told is None else 1]  # a classifier that knows no padding takes one text at a time
        calibrate(model, self._inputs(few.long()))


@contextmanager
def _gathered_alone(plugin: FullyShardedDataParallelPlugin | None, model: nn.Module, whole: bool) -> Iterator[None]:
    """Have FSDP2 gather each variant, or each whole attention module, by itself in a model prepared meanwhile.

    FSDP2 gathers the parameters of a layer for the backward pass of what the layer gives, and losses of alignment arise
    inside it. They are of the output of these modules.
    """
    if plugin is None:
        yield
        return
    variants = swapped_modules(model)
    kinds = {type(model.get_submodule(path) if whole else variant).__name__ for path, variant in variants.items()}
    before = plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = [*(before or model._no_split_modules or []), *sorted(kinds)]
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = before
