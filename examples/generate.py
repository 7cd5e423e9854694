"""Generate text with a conversion, and print what its cache takes beside softmax's.

Linear variants keep a state of constant size in place of all keys and values.

    pip install hf_attnswap
    python generate.py --model_name_or_path finetuned --prompt "Once upon a time"
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attnswap
from hf_attnswap.integration.cache import cache_nbytes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a conversion; a plain model generates as it is")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args(argv)

    # `import hf_attnswap` is all that transformers needs to load a conversion.
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    kinds = sorted({module.swapped or "softmax" for module in hf_attnswap.inspect(model)})
    inputs = tokenizer(args.prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, return_dict_in_generate=True
        )
    print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    print(f"{', '.join(kinds)}: cache of {cache_nbytes(output.past_key_values):,} bytes")


if __name__ == "__main__":
    main()
