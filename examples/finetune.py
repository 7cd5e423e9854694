"""Fine-tune a swapped model on the next token, with the whole training loop in sight: all weights, or LoRA.

The command `accelerate launch -m hf_attnswap.training finetune` does the same with checkpoints, logs and more options.

    pip install hf_attnswap[finetune]
    accelerate launch finetune.py --model_name_or_path aligned --train_file book.txt --use_lora --output_dir finetuned
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attnswap
from hf_attnswap.sources.blocks import cut, start_tokens


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a conversion, or a model for --attention")
    parser.add_argument("--attention", help="swap to this variant first, see `attnswap ls`")
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--use_lora", action="store_true", help="train LoRA on the query and value projections")
    parser.add_argument("--block_size", type=int, default=512, help="tokens per block")
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args(argv)
    accelerator = Accelerator()
    set_seed(0)

    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if args.attention:
        hf_attnswap.swap(model, args.attention)
    if args.use_lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if ".attnswap." in name:  # the new parameters of the swapped attention train in full
                parameter.requires_grad_(True)
    with open(args.train_file, encoding="utf-8") as file:
        tokens = tokenizer(file.read(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    blocks = cut(tokens, args.block_size, start_tokens(tokenizer))  # each begins as the tokenizer begins a text
    loader = DataLoader(blocks, batch_size=args.per_device_train_batch_size, shuffle=True)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_train_steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = 0
    while step < args.max_train_steps:
        for batch in loader:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step == 1 or step % 10 == 0:
                accelerator.print(f"step {step}: loss {loss.item():.4f}")
            if step == args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        if args.use_lora:
            model = model.merge_and_unload()  # a plain model again
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
