"""Align a swapped model, with the whole training loop in sight: each layer learns the softmax output of its layer.

The command `accelerate launch -m hf_attnswap.training align` does the same with checkpoints, logs and more options.

    pip install hf_attnswap
    accelerate launch align.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file book.txt \\
        --output_dir aligned
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attnswap
from hf_attnswap.sources.blocks import cut, start_tokens
from hf_attnswap.training.align import aligning, alignment_loss, calibrate, trainable_parameters


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--attention", default="hedgehog+window", help="a variant with parameters")
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--block_size", type=int, default=512, help="tokens per block")
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    args = parser.parse_args(argv)
    accelerator = Accelerator()
    set_seed(0)

    # The model is in eval mode: the teacher, softmax, runs in the same forward pass and must not drop out.
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path).eval().to(accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    with open(args.train_file, encoding="utf-8") as file:
        tokens = tokenizer(file.read(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    blocks = cut(tokens, args.block_size, start_tokens(tokenizer))  # each begins as the tokenizer begins a text
    loader = DataLoader(blocks, batch_size=args.per_device_train_batch_size, shuffle=True)

    hf_attnswap.swap(model, args.attention)
    calibrate(model, blocks[:2])
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_train_steps)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = 0
    with aligning(model) as losses:
        while step < args.max_train_steps:
            for batch in loader:
                loss = alignment_loss(prepared, batch, losses)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                if step == 1 or step % 10 == 0:
                    accelerator.print(f"step {step}: loss {loss.item():.4f}, 0 is softmax and 1 a constant")
                if step == args.max_train_steps:
                    break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
