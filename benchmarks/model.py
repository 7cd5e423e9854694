"""A whole model by context length: reading a prompt, writing after it, and memory, one attention beside the other.

The arms take turns in every round, and each figure is a ratio to the softmax of its own round (the model as it is, with
torch's SDPA). To write after a long context nothing is read: the cache is filled once per arm with random keys and
values, and states made of these, and further tokens are timed on it. Peak memory is that of the prefill, on top of what
was there before.

    python benchmarks/model.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir model_bench
"""

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from figures import Record, draw, heading, named, note, print_table, quartiles, spread
from transformers import PreTrainedModel

from hf_attnswap import UsageError
from hf_attnswap.benchmark.generation import Run, decode, filled_cache, run
from hf_attnswap.benchmark.measure import interleaved, ratios
from hf_attnswap.errors import one_line_errors
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.sources.files import require_empty, whole_folder
from hf_attnswap.sources.models import load
from hf_attnswap.tradeoff.arms import Arm, build

ARMS = ["elu", "hedgehog+window"]
CONTROL = "softmax"


def models_of(model: PreTrainedModel, arms: Sequence[str]) -> dict[str, PreTrainedModel]:
    """A model for each arm over the same weights; softmax is the model itself."""
    return {CONTROL: model} | {arm.label: build(arm, model) for arm in map(Arm.parse, arms)}


def prefill(models: dict[str, PreTrainedModel], length: int, args: argparse.Namespace) -> Iterator[Record]:
    """Seconds, ratio, peak memory and bytes of the cache of one prompt of random tokens."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(models[CONTROL].config.vocab_size, (1, length), generator=generator)
    found: dict[str, list[Run]] = {name: [] for name in models}

    def read(name: str) -> None:
        found[name].append(run(models[name], prompt, 1))

    for name in models:  # what a first call allocates
        run(models[name], prompt[:, :16], 1)
    runs = {name: functools.partial(read, name) for name in models}
    kept = interleaved(runs, args.rounds, warmup=0, budget_s=args.budget)
    times = {name: [r.prefill_s for r in found[name]][-len(kept[name]) :] for name in models}
    for name in models:
        peaks = [r.peak_memory_mib for r in found[name] if r.peak_memory_mib is not None]
        yield {
            "arm": name,
            "work": "prefill",
            "length": length,
            "tokens_per_s": quartiles([length / t for t in times[name]]),
            "ratio": None if name == CONTROL else quartiles(ratios(times[CONTROL], times[name])),
            "peak_memory_mib": max(peaks) if peaks else None,
            "cache_mib": found[name][0].cache_bytes / 2**20,
        }


def write(models: dict[str, PreTrainedModel], length: int, args: argparse.Namespace) -> Iterator[Record]:
    """Tokens per second after `length` tokens, ratio and bytes of the cache."""
    caches = {name: filled_cache(model, length) for name, model in models.items()}
    token = torch.zeros(1, 1, dtype=torch.long)
    runs = {name: functools.partial(decode, models[name], caches[name], token, args.new_tokens) for name in models}
    times = interleaved(runs, args.rounds, budget_s=args.budget)
    for name in models:
        yield {
            "arm": name,
            "work": "decode",
            "length": length,
            "tokens_per_s": quartiles([args.new_tokens / t for t in times[name]]),
            "ratio": None if name == CONTROL else quartiles(ratios(times[CONTROL], times[name])),
            "peak_memory_mib": None,
            "cache_mib": cache_nbytes(caches[name]) / 2**20,
        }


def measure(args: argparse.Namespace, dtype: str) -> Iterator[Record]:
    model, _ = load(args.model_name_or_path, dtype=dtype, device="cpu")
    models = models_of(model, args.arm)
    for work, lengths in ((prefill, args.length), (write, args.context_length)):
        for length in lengths:
            for record in work(models, length, args):
                note(f"{dtype}, {record['work']}, {length} tokens, {record['arm']}: "
                     f"{record['tokens_per_s']['median']:.4g} tokens/s")  # fmt: skip
                yield record | {"dtype": dtype}


def tables(report: Record) -> None:
    for dtype, work in dict.fromkeys((r["dtype"], r["work"]) for r in report["figures"]):
        rows = []
        for r in report["figures"]:
            if (r["dtype"], r["work"]) != (dtype, work):
                continue
            peak = "" if r["peak_memory_mib"] is None else f"{r['peak_memory_mib']:.0f}"
            rows.append([r["arm"], str(r["length"]), spread(r["tokens_per_s"]), spread(r["ratio"]),
                         f"{r['cache_mib']:.1f}", peak])  # fmt: skip
        print_table(
            f"{work}, {dtype}: median and quartiles over the rounds",
            ["", "tokens", "tokens / s", "times softmax's", "cache MiB", "peak MiB"],
            rows,
        )


def main(argv: Sequence[str] | None = None) -> Record:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for model.json and model.png")
    parser.add_argument(
        "--arm", action="append", help=f"such as relu_power:p=8 or plan.yaml, repeated (default: {' '.join(ARMS)})"
    )
    parser.add_argument("--length", type=int, action="append", help="of prompts, repeated (default: 1024, 8192)")
    parser.add_argument(
        "--context_length", type=int, action="append", help="to write after, repeated (default: 1024, 4096, 16384)"
    )
    parser.add_argument("--new_tokens", type=int, default=8, help="per round (default: %(default)s)")
    parser.add_argument("--dtype", action="append", help="may be repeated (default: float32, bfloat16)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=60, help="seconds for all rounds of one length, of which at least one is done "
        "(default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.arm = [arm for arm in dict.fromkeys(args.arm or ARMS) if arm != CONTROL]
    args.length = sorted(set(args.length or [1024, 8192]))
    args.context_length = sorted(set(args.context_length or [1024, 4096, 16384]))
    if min(*args.length, *args.context_length, args.rounds, args.threads, args.new_tokens) < 1:
        raise UsageError("lengths, new_tokens, rounds and threads must be at least 1")
    require_empty(args.output_dir)
    torch.set_num_threads(args.threads)
    report = heading(argv, model=named(args.model_name_or_path), rounds=args.rounds, budget_s=args.budget)
    dtypes = dict.fromkeys(args.dtype or ["float32", "bfloat16"])
    report["figures"] = [record for dtype in dtypes for record in measure(args, dtype)]
    panels: dict[str, dict[str, list[Record]]] = {}
    for record in report["figures"]:
        if record["ratio"]:
            lines = panels.setdefault(f"{record['work']}, {record['dtype']}", {})
            lines.setdefault(record["arm"], []).append(record)
    picture = draw(panels, "times as fast as softmax")
    with whole_folder(args.output_dir) as folder:
        (folder / "model.json").write_text(json.dumps(report, indent=1))
        (folder / "model.png").write_bytes(picture)
    tables(report)
    return report


if __name__ == "__main__":
    with one_line_errors("model"):
        main()
