"""Generate text with an exported conversion, greedily, by onnxruntime alone: without torch and transformers.

Whoever exports needs `pip install hf_attnswap[onnx]`, whoever generates `pip install onnxruntime tokenizers`.

    attnswap export converted --format onnx --output_dir converted_onnx
    python onnx_generate.py --model_name_or_path converted_onnx --prompt "Once upon a time"
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(session, ids: list[int], max_new_tokens: int, end: set[int]) -> tuple[list[int], int]:
    """Return the tokens that follow `ids`, and how many bytes are remembered of the text."""
    sizes, kinds = {"batch": 1, "past": 0}, {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    past = {
        given.name: np.zeros([sizes.get(size, size) for size in given.shape], kinds[given.type])
        for given in session.get_inputs()
        if given.name.startswith("past.")
    }
    written: list[int] = []
    new = ids
    while len(written) < max_new_tokens and not end.intersection(written[-1:]):
        tokens = np.array([new])
        logits, *present = session.run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **past})
        past = dict(zip(past, present, strict=True))
        new = [int(logits[0, -1].argmax())]
        written += new
    return written, sum(tensor.nbytes for tensor in past.values())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, type=Path, help="the folder of an export")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args(argv)

    tokenizer = Tokenizer.from_file(str(args.model_name_or_path / "tokenizer.json"))
    end = json.loads((args.model_name_or_path / "generation_config.json").read_text()).get("eos_token_id")
    session = onnxruntime.InferenceSession(args.model_name_or_path / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tokenizer.encode(args.prompt).ids
    written, remembered = generate(
        session, ids, args.max_new_tokens, set(end if isinstance(end, list) else [] if end is None else [end])
    )
    print(tokenizer.decode(ids + written))
    print(f"{len(ids) + len(written) - 1} tokens remembered in {remembered:,} bytes")


if __name__ == "__main__":
    main()
