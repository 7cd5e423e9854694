"""Add LoRA to the attention's projections, and merge the LoRA weights into a plain model."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..integration.finding import inspect
from ..integration.swapping import swapped_modules
from .loading import predicts_next_tokens
from .options import LoraOptions


def with_lora(model: PreTrainedModel, options: LoraOptions, accelerator: Accelerator) -> nn.Module:
    """Return the model, with LoRA on the projections of its attention modules where `use_lora` is set.

    The variants' parameters train beside LoRA. `merged` makes a plain model again.

    Raises:
        UsageError: the model runs under FSDP1, or peft is not installed.
    """
    if not options.use_lora:
        return model
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError("--use_lora does not work under FSDP1, which flattens frozen weights: set fsdp_version: 2")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UsageError("--use_lora needs peft: pip install 'hf_attnswap[finetune]'") from None
    projections = [
        f"{attention.name}.{name}"
        for attention in inspect(model)
        for name, module in model.get_submodule(attention.name).named_children()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=projections,
        task_type="CAUSAL_LM" if predicts_next_tokens(model) else None,
    )
    wrapped = get_peft_model(model, config)  # its dropout is on, that of the loaded model is off
    for variant in swapped_modules(wrapped).values():
        variant.requires_grad_(True)
    return wrapped


def merged(model: nn.Module) -> PreTrainedModel:
    """Return a plain model, with the LoRA weights added to the weights that they change."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload()
