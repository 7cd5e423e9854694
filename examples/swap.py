"""Swap the attention of a pretrained model, look at what changed, and undo it.

pip install hf_attnswap
python swap.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --attention relu_norm
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attnswap


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--attention", default="relu_norm", help="a variant, see `attnswap ls` (default: %(default)s)")
    parser.add_argument("--layers", help="a slice such as '1::2' (default: all layers)")
    parser.add_argument("--text", default="The quick brown fox jumps over the lazy dog.")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    inputs = AutoTokenizer.from_pretrained(args.model_name_or_path)(args.text, return_tensors="pt")
    softmax = loss(model, inputs)

    hf_attnswap.swap(model, args.attention, layers=args.layers)
    for module in hf_attnswap.inspect(model):
        print(f"{module.name}: {module.swapped or 'softmax'}")
    swapped = loss(model, inputs)

    hf_attnswap.restore(model)
    restored = loss(model, inputs)
    print(
        f"loss per token: softmax {softmax:.3f}, {args.attention} without training {swapped:.3f}, undone {restored:.3f}"
    )


@torch.no_grad()
def loss(model, inputs):
    return model(**inputs, labels=inputs["input_ids"]).loss.item()


if __name__ == "__main__":
    main()
