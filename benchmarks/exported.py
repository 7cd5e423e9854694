"""Speed and memory of a model as an ONNX graph in onnxruntime, beside torch: unconverted, and with a plan.

All four take turns in every round, on one thread: a text is read whole, with the logits of all its tokens, and then
some tokens are fed one by one. Figures are processor time, which other programs on the machine disturb less than the
time on the wall. The unconverted model is exported as a conversion is, and runs as torch's SDPA in torch.

    pip install -e ".[onnx,demo]"
    python benchmarks/exported.py MODEL --plan benchmarks/plans/smollm2-135m-quarter.yaml --output_dir exported

Each graph is written to a folder of `--output_dir`; one that is there is not written again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from figures import Record, heading, note, print_table, quartiles, spread
from transformers import DynamicCache, PreTrainedModel

import hf_attnswap
from hf_attnswap.errors import one_line_errors
from hf_attnswap.export.onnx import FILE, export
from hf_attnswap.integration.cache import StateLayer
from hf_attnswap.sources.files import whole_folder, write_whole
from hf_attnswap.sources.models import load
from hf_attnswap.sources.plans import read_plan


class InTorch:
    """Read tokens with a model, and remember them."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def start(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits `[1, T, V]` of new tokens, int64 `[1, T]`."""
        return self.model(torch.from_numpy(tokens), past_key_values=self.cache, use_cache=True).logits.numpy()

    def remembered(self) -> int:
        """Return the bytes that are kept of the text."""
        layers = self.cache.layers
        kept = [
            layer.state.values() if isinstance(layer, StateLayer) else (layer.keys, layer.values) for layer in layers
        ]
        return sum(t.nbytes for tensors in kept for t in tensors)


class InOnnxruntime:
    """Read tokens with a graph, and remember them."""

    def __init__(self, graph: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def start(self) -> None:
        sizes, kinds = {"batch": 1, "past": 0}, {"tensor(int64)": np.int64, "tensor(float)": np.float32}
        self.past = {
            given.name: np.zeros([sizes.get(size, size) for size in given.shape], kinds[given.type])
            for given in self.session.get_inputs()
            if given.name.startswith("past.")
        }

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits `[1, T, V]` of new tokens, int64 `[1, T]`."""
        given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **self.past}
        logits, *present = self.session.run(None, given)
        self.past = dict(zip(self.past, present, strict=True))
        return logits

    def remembered(self) -> int:
        """Return the bytes that are kept of the text."""
        return sum(tensor.nbytes for tensor in self.past.values())


def timed(runs: dict[str, InTorch | InOnnxruntime], tokens: np.ndarray, steps: int) -> dict[str, Record]:
    """Return of one round, by name, seconds of the text and of a step, bytes remembered, and the last logits."""
    found = {}
    for name, run in runs.items():
        run.start()
        begun = time.process_time()
        run.read(tokens[:, :-steps])
        read = time.process_time()
        for i in range(-steps, 0):
            logits = run.read(tokens[:, i : i + 1 or None])
        done = time.process_time()
        found[name] = dict(text=read - begun, step=(done - read) / steps, bytes=run.remembered(), logits=logits)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_name_or_path")
    parser.add_argument("--plan", required=True, type=Path, help="a plan file")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--length", type=int, action="append", help="tokens of a text; default 512 and 2048")
    parser.add_argument("--steps", type=int, default=16, help="tokens fed one by one after it")
    parser.add_argument("--rounds", type=int, default=3, help="after one that does not count")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    runs: dict[str, InTorch | InOnnxruntime] = {}
    for name in ("softmax", "plan"):
        model = load(args.model_name_or_path, dtype="float32")[0].eval()
        if name == "plan":
            plan = read_plan(args.plan)
            plan.require(model)
            hf_attnswap.swap(model, plan.swap)
        folder = args.output_dir / name
        if not (folder / FILE).is_file():
            note(f"{folder / FILE} is written, which takes minutes")
            with whole_folder(folder) as written:
                export(model, written)
        runs[f"{name}, torch"] = InTorch(model)
        runs[f"{name}, onnxruntime"] = InOnnxruntime(folder / FILE)

    vocabulary = model.config.vocab_size
    record = {**heading(argv, threads=1, onnxruntime=onnxruntime.__version__), "rows": []}
    for length in args.length or (512, 2048):
        tokens = np.random.default_rng(0).integers(0, vocabulary, (1, length + args.steps))
        rounds = []
        for number in range(args.rounds + 1):
            note(f"{length} tokens, round {number} of {args.rounds}")
            rounds.append(timed(runs, tokens, args.steps))
        for name in runs:
            other = name.replace("onnxruntime", "torch")
            row = {"length": length, "name": name, "bytes": rounds[-1][name]["bytes"]}
            row["differs"] = float(np.abs(rounds[-1][name]["logits"] - rounds[-1][other]["logits"]).max())
            row |= {key: quartiles([each[name][key] for each in rounds[1:]]) for key in ("text", "step")}
            record["rows"].append(row)
    write_whole(args.output_dir / "exported.json", json.dumps(record, indent=1).encode())
    show(record["rows"])


def show(rows: list[Record]) -> None:
    """Print the table: a row for each length and candidate."""
    print_table(
        "Seconds of processor time on one thread; median and quartiles of the rounds",
        ("tokens", "candidate", "the text", "a step after it", "MiB remembered", "logits differ from torch's"),
        [
            [
                str(row["length"]), row["name"], spread(row["text"]), spread(row["step"]),
                f"{row['bytes'] / 2**20:.1f}", f"{row['differs']:.1e}" if row["differs"] else "",
            ]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    with one_line_errors("exported"):
        main()
