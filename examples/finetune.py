"""Fine-tune a model on the next token, swapped or not: all weights, or LoRA on the attention's projections.

Train the softmax model in the same way for a control. There is no dropout but that of LoRA: the swapped attention has
none. With LoRA, the swapped attention's own parameters train in full, and the saved model is a plain one: the LoRA
weights are merged into it.

    accelerate launch examples/finetune.py --model_name_or_path aligned/model --use_lora \\
        --train_file book.txt --max_train_tokens 500000 --learning_rate 1e-4 --output_dir finetuned
"""

import argparse
from collections.abc import Sequence

from accelerate.utils import DistributedType
from common import read_text, run, save, start, swap_as_asked, training_parser
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_attnswap import UsageError, inspect
from hf_attnswap.errors import one_line_errors
from hf_attnswap.loading import load
from hf_attnswap.patching import describe, swapped_modules
from hf_attnswap.training.loop import next_token_loss


def main(argv: Sequence[str] | None = None) -> None:
    parser = training_parser(__doc__, learning_rate=5e-5)
    parser.add_argument("--use_lora", action="store_true", help="train LoRA weights in place of all weights")
    parser.add_argument("--lora_r", type=int, default=16, help="rank (default: %(default)s)")
    parser.add_argument("--lora_alpha", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    accelerator = start(args)
    if args.use_lora and accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("--use_lora does not work under FSDP: use multi_gpu.yaml")
    model, tokenizer = load(args.model_name_or_path, dtype=args.dtype, device=accelerator.device)
    if args.attention:
        swap_as_asked(model, args, args.attention)
    elif args.layers or args.option:
        raise UsageError("--layers and --option belong to --attention, which is missing")
    trained = with_lora(model, args) if args.use_lora else model
    history = run(args, accelerator, trained, read_text(args, accelerator, tokenizer), next_token_loss)
    model = trained.merge_and_unload() if args.use_lora else model
    folder = save(args, accelerator, model, tokenizer)
    accelerator.print(f"{folder}: {describe(model)}, loss {history[0]:.4f} -> {history[-1]:.4f}")


def with_lora(model: PreTrainedModel, args: argparse.Namespace) -> nn.Module:
    """The model with LoRA on the projections of its attention modules, and the variants' parameters trainable."""
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


if __name__ == "__main__":
    with one_line_errors("finetune"):
        main()
