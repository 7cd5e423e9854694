"""Fine-tune a swapped model with transformers' own Trainer: it is a model like any other.

    python examples/finetune_trainer.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --attention relu_norm \\
        --train_file book.txt --max_steps 100 --output_dir tuned
"""

import argparse
from collections.abc import Sequence

import datasets
from transformers import Trainer, TrainingArguments, default_data_collator

import hf_attnswap
from hf_attnswap.errors import one_line_errors
from hf_attnswap.sources.models import load
from hf_attnswap.sources.texts import TextSource, token_blocks


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model_name_or_path", "attention", "train_file", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    args = parser.parse_args(argv)
    model, tokenizer = load(args.model_name_or_path)
    hf_attnswap.swap(model, args.attention)
    blocks = token_blocks(TextSource(args.train_file), tokenizer, args.block_size)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            args.output_dir,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=1,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    with one_line_errors("finetune_trainer"):
        main()
