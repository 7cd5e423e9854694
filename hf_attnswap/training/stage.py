"""Define what a stage of training is: its options, what trains, its loss, and one sentence about it.

A file in `stages/` that holds a subclass of `Stage` is a stage: its `name` is a command of
`python -m hf_attnswap.training` and a value of `stage` in a recipe.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..integration.objectives import require_positions
from ..integration.swapping import describe
from ..launch import say
from ..sources.blocks import start_tokens
from ..sources.files import write_whole
from .batches import batches, require_separate
from .loading import load_to_train, predicts_next_tokens, require_next_tokens, tokenizer_of
from .lora import merged, with_lora
from .options import TextOptions, WholeModelOptions, deeds
from .recompute import recompute_layers
from .run import count_steps, embeddings_of, read_text, run_steps, save, swap_as_asked
from .validation import log_validation, read_validation

RECORD = "stage.json"  # what a run did, beside its log


@dataclass(kw_only=True)
class Stage(TextOptions):
    """Define the base of all stages: a dataclass whose fields are the options of a run, see `options.argument`.

    A stage sets `name`, writes `loss` and `trains`, and overrides what else differs.

    Attributes:
        name: the word for the stage on the command line and in a recipe.
        fsdp1: why the stage does not run under FSDP1; None where the stage does.
    """

    name: ClassVar[str]
    fsdp1: ClassVar[str | None] = None

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the loss of a batch of token blocks, `[B, block_size, ...]`, as a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def trains(self) -> str:
        """Return what trains, in the words of the model card."""
        raise NotImplementedError(f"{type(self).__name__} does not say what trains")

    def moves_the_original(self) -> bool:
        """Return whether the stage changes what the model computes with softmax switched on."""
        return True

    def require(self, model: PreTrainedModel) -> None:
        """Raise UsageError where the stage cannot train a model of this class; by default, one without next tokens."""
        require_next_tokens(model, self.model_name_or_path)

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise UsageError where `require` does, or where a block is longer than the positions that a model learned."""
        self.require(model)
        require_positions(model, self.block_size, "--block_size")

    def prepare(self, model: PreTrainedModel, blocks: Tensor, accelerator: Accelerator) -> nn.Module:
        """Swap the model where `attention` is given, choose what requires a gradient, and return the module to train.

        Raises:
            UsageError: the options do not fit each other or the model.
        """
        swap_as_asked(model, self, accelerator)
        return model

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Open what the steps need and close it after them; the default opens nothing."""
        yield

    def finish(self, model: nn.Module, blocks: Tensor) -> None:
        """Change the trained model before it is saved; the default changes nothing."""

    def read_validation(self, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
        """Return blocks `[N, block_size]` on which the perplexity is logged; None for no validation."""
        return None

    def run(self, accelerator: Accelerator) -> Path:
        """Train, save, and return the folder of the trained model.

        Raises:
            UsageError: the stage does not run under FSDP1, or the options do not fit each other, the model or the text.
        """
        if self.fsdp1 and accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise UsageError(f"{self.name} does not work under FSDP1, {self.fsdp1}: set fsdp_version: 2")
        accelerator.free_memory()  # of what an earlier stage of a recipe prepared
        model, processor = load_to_train(self.model_name_or_path, self.dtype, accelerator.device)
        self.require_fit(model)
        tokenizer = tokenizer_of(processor)
        blocks = read_text(self, accelerator, tokenizer, closed=not predicts_next_tokens(model))
        trained = self.prepare(model, blocks, accelerator)
        validation = self.read_validation(accelerator, tokenizer)
        say(accelerator, f"a text of {len(blocks) * self.block_size:,} tokens")
        if self.separate_documents:
            require_separate(trained)
        steps, tokens = count_steps(self, accelerator)
        begins = start_tokens(tokenizer)
        given = max(1, len(begins))

        def validate(step: int) -> None:
            if step % self.validation_steps == 0 or step == steps:
                log = self.output_dir / "validation_log.jsonl"
                log_validation(accelerator, trained, validation, log, step, step * tokens, given)

        with self.training(trained):
            losses = run_steps(
                self,
                accelerator,
                trained,
                batches(blocks, self.per_device_train_batch_size, self.seed, self.lengths_of_texts(), begins),
                self.loss,
                steps=steps,
                step_size=tokens,
                validate=None if validation is None else validate,
            )
        self.finish(trained, blocks)
        model = merged(trained)
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            record = {"stage": self.name, "trains": self.trains(), "options": deeds(self)}
            write_whole(self.output_dir / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        folder = save(self, accelerator, model, processor)
        accelerator.print(f"{folder}: {describe(model)}, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        return folder


@dataclass(kw_only=True)
class WholeModelStage(WholeModelOptions, Stage):
    """Define the base of the stages that train all weights, or LoRA on the projections, by the output of the model."""

    def trains(self) -> str:
        if self.use_lora:
            return "LoRA on the projections, and the parameters of the variant"
        return "all weights but the embeddings" if self.freeze_embeddings else "all weights"

    def prepare(self, model: PreTrainedModel, blocks: Tensor, accelerator: Accelerator) -> nn.Module:
        super().prepare(model, blocks, accelerator)
        if self.freeze_embeddings:
            for embeddings in embeddings_of(model):
                embeddings.requires_grad_(False)
        return with_lora(model, self, accelerator)

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        if self.gradient_checkpointing:
            recompute_layers(model)
        yield

    def read_validation(self, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
        return read_validation(self, accelerator, tokenizer)
