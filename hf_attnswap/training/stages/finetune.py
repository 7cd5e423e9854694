"""Fine-tune a model on the next token, swapped or not: all weights, or LoRA on the attention's projections.

Train the softmax model in the same way for a control. There is no dropout but that of LoRA: the swapped attention has
none. With LoRA, the swapped attention's own parameters train in full, and the saved model is a plain one: the LoRA
weights are merged into it.

    accelerate launch -m hf_attnswap.training finetune --model_name_or_path aligned/model --use_lora \\
        --train_file book.txt --max_train_tokens 500000 --learning_rate 1e-4 --output_dir finetuned
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..loop import next_token_loss
from ..options import argument
from ..stage import WholeModelStage


@dataclass(kw_only=True)
class Finetune(WholeModelStage):
    """The model learns the next token of the text."""

    name: ClassVar[str] = "finetune"

    learning_rate: float = argument(5e-5, "highest learning rate of AdamW")

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return next_token_loss(model, batch)
