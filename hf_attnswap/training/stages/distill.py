"""Distil the original model into the swapped one: the same next-token distribution, on any text.

The original is the teacher. With LoRA it is the model itself, with softmax switched on and LoRA off, so that one copy
of the weights is in memory; without, a frozen copy of the model as it starts, with softmax switched on. Both are the
original as long as nothing but the swapped attention's own parameters has been trained; else name the original with
--teacher_name_or_path. Under FSDP2 the teacher is sharded as the model is.

    accelerate launch -m hf_attnswap.training distill --model_name_or_path aligned/model --train_file book.txt \\
        --max_train_tokens 500000 --output_dir distilled
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UsageError
from ...integration.swapping import swapped_modules
from ..distill import DEFAULT_LEARNING_RATE, distillation_loss, require_weights
from ..loading import load_to_train, require_next_tokens
from ..options import argument
from ..stage import WholeModelStage
from ..teacher import frozen


@dataclass(kw_only=True)
class Distill(WholeModelStage):
    """The swapped model learns the next-token distribution of the original."""

    name: ClassVar[str] = "distill"
    fsdp1: ClassVar[str | None] = "which flattens the output embeddings"

    learning_rate: float = argument(DEFAULT_LEARNING_RATE, "highest learning rate of AdamW")
    teacher_name_or_path: str | None = argument(None, "the original model; the model itself, with softmax, without it")
    temperature: float = argument(1.0, "divides the logits")
    hidden_weight: float = argument(
        0.0, "factor of the cosine distance of each layer's hidden states, beside the divergence"
    )
    label_weight: float = argument(
        0.0, "share of the text's own next token in what is learned, from 0 to 1; the rest is the original's"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self.temperature, self.hidden_weight, self.label_weight)

    def prepare(self, model: PreTrainedModel, blocks: Tensor, accelerator: Accelerator) -> nn.Module:
        trained = super().prepare(model, blocks, accelerator)
        if not swapped_modules(model):
            raise UsageError(f"the attention of {self.model_name_or_path!r} is not swapped: give --attention")
        if self.teacher_name_or_path:
            teacher, _ = load_to_train(self.teacher_name_or_path, self.dtype, accelerator.device)
            require_next_tokens(teacher, self.teacher_name_or_path)
            self._teacher = frozen(teacher)
        else:
            self._teacher = trained if self.use_lora else frozen(copy.deepcopy(trained))
        if accelerator.is_fsdp2 and self._teacher is not trained:  # the model itself is sharded with its optimiser
            plugin = accelerator.state.fsdp_plugin
            asked = plugin.transformer_cls_names_to_wrap
            self._teacher = fsdp2_prepare_model(accelerator, self._teacher)
            plugin.transformer_cls_names_to_wrap = asked  # not the teacher's, where its class is another
        self._autocast = accelerator.autocast
        return trained

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        with self._autocast():
            return distillation_loss(
                model,
                self._teacher,
                batch,
                temperature=self.temperature,
                hidden_weight=self.hidden_weight,
                label_weight=self.label_weight,
            )
