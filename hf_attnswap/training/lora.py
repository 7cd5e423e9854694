"""LoRA on the attention's projections, for the scripts that train a language model."""

import argparse

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_attnswap import UsageError, inspect
from hf_attnswap.integration.swapping import swapped_modules


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--use_lora", action="store_true", help="train LoRA weights in place of all weights")
    parser.add_argument("--lora_r", type=int, default=16, help="rank (default: %(default)s)")
    parser.add_argument("--lora_alpha", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="(default: %(default)s)")


def with_lora_if_asked(model: PreTrainedModel, args: argparse.Namespace, accelerator: Accelerator) -> nn.Module:
    """The model, or where `--use_lora` says so the model with LoRA on the projections of its attention modules, and
    the variants' parameters trainable. `merged` takes it apart again."""
    if not args.use_lora:
        return model
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("--use_lora does not work under FSDP: use multi_gpu.yaml")
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
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=projections,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)  # its dropout is on, that of the loaded model is off
    for variant in swapped_modules(wrapped).values():
        variant.requires_grad_(True)
    return wrapped


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain model, with the LoRA weights added to those that they stand on."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload()
