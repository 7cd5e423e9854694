"""Speed and memory of attention alone, by length, beside torch's SDPA, eager softmax, ONNX Runtime and
pytorch-fast-transformers.

All candidates take turns in every round, and each figure is a ratio to the SDPA of its own round. Feature maps are
included, inputs are random. `softmax` is that of this package, in the tiles of its scores: what an activation gains by
itself is its ratio to that row. ONNX Runtime's operator stands there bare, which is less than attention, and with map
and division. One decode step goes from the state after n tokens, or to n keys; peak memory is that of
forward + backward, on top of what was there before, in a process of its own. Every length, or what was left out and
why, stands in the table.

    pip install --no-build-isolation -e ".[bench-peer]"      # builds a peer's C++; a peer that is missing is left out
    python benchmarks/attention.py --output_dir bench
    python benchmarks/attention.py --output_dir bench --attention elu --length 1024 --length 8192

That build takes an nvcc on the PATH for a wish for CUDA, and fails with a torch that has none: hide it then.
"""

import argparse
import functools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import Record, draw, heading, note, print_table, quartiles, spread
from peers import Eager, FastTransformers, OnnxRuntime

from hf_attnswap import UsageError, attentions, native
from hf_attnswap.attentions import Heads
from hf_attnswap.benchmark.attention import Candidate, Sdpa, Variant, forward, forward_backward, random_inputs
from hf_attnswap.benchmark.measure import interleaved, peak_memory_mib, ratios
from hf_attnswap.errors import one_line_errors
from hf_attnswap.ops.backends import told, watch
from hf_attnswap.sources.files import require_empty, whole_folder
from hf_attnswap.sources.models import find_dtype
from hf_attnswap.statistics import Spread, crossover
from hf_attnswap.tradeoff import Arm

ATTENTIONS = (
    "softmax elu hedgehog gated delta gated_delta hedgehog+window window relu relu_norm relu_power:p=8 relu_power:p=16 "
    "sigmoid softplus gelu"
).split()
LENGTHS = [2**power for power in range(7, 16)]
WORKS = "forward", "forward + backward", "decode"
STEPS = 20  # timed together: one lasts microseconds
PATIENCE = 4  # times the budget that a call of a control may take: without it there is no ratio
SDPA, BOTH_WAYS = "SDPA", "SDPA, bidirectional"
SOFTMAX = "softmax"  # that of this package
PEERS = {
    "fast-transformers": FastTransformers,
    "ONNX Runtime, bare": functools.partial(OnnxRuntime, False),
    "ONNX Runtime, elu": functools.partial(OnnxRuntime, True),
}


@dataclass(frozen=True)
class Entry:
    """A candidate: what it is held against (None for a control), how its time grows, and what it is measured in."""

    candidate: Candidate
    control: str | None
    growth: int  # of the time of a text, as a power of its length
    works: tuple[str, ...] = WORKS
    dtypes: tuple[torch.dtype, ...] | None = None  # all


def entries(names: Sequence[str], heads: Heads, dtype: torch.dtype) -> dict[str, Entry]:
    """Controls, variants and peers, by the name in the table."""
    found = {SDPA: Entry(Sdpa(), None, 2), "eager": Entry(Eager(), SDPA, 2)}
    for name in names:
        arm = Arm.parse(name)
        torch.manual_seed(0)
        variant = attentions.get(arm.attention)(heads, **arm.options).to(dtype)
        found[name] = Entry(Variant(variant), SDPA, 2 if variant.cost_class == "quadratic" else 1)
    if "elu" in found:
        alone = ("forward",)
        found[BOTH_WAYS] = Entry(Sdpa(causal=False), None, 2, alone)
        bidirectional = Variant(found["elu"].candidate.attention, causal=False)
        found["elu, bidirectional"] = Entry(bidirectional, BOTH_WAYS, 1, alone)
    for name, candidate in peers().items():
        if not isinstance(candidate, str):
            works = ("forward", "decode") if isinstance(candidate, OnnxRuntime) else WORKS
            found[name] = Entry(candidate, SDPA, 1, works, (torch.float32,))
    return found


@functools.cache
def peers() -> dict[str, Candidate | str]:
    """The peers by name, or why one cannot run."""
    found: dict[str, Candidate | str] = {}
    for name, make in PEERS.items():
        try:
            found[name] = make()
        except ImportError as error:
            found[name] = str(error)
    return found


def measure(args: argparse.Namespace, heads: Heads, dtype: torch.dtype, threads: int) -> Iterator[Record]:
    """One record per candidate, work and length: seconds and ratios of all rounds, or why there are none."""
    torch.set_num_threads(threads)
    candidates = entries(args.attention, heads, dtype)
    for work in WORKS:
        known: dict[str, tuple[int, float]] = {}  # the last length of each, and its seconds
        for length in args.length:
            inputs = random_inputs(heads, length, batch_size=args.batch_size, dtype=dtype)
            runs, reasons = {}, {}
            for name, entry in candidates.items():
                reasons[name] = unfit(entry, work, dtype, heads, length, args.batch_size) or too_slow(
                    entry, work, length, known.get(name), args.budget
                )
                if not reasons[name]:
                    runs[name] = call(entry.candidate, work, inputs)
            with torch.no_grad() if work == "decode" else torch.enable_grad():
                times = interleaved(runs, args.rounds, budget_s=args.budget)
            took = sum(map(sum, times.values()))
            note(f"{str(dtype)[6:]}, {work}, {threads} threads, {length} tokens: {took:.1f} s")
            for name, entry in candidates.items():
                if work not in entry.works:
                    continue
                record = {"attention": name, "control": entry.control, "work": work, "dtype": str(dtype)[6:]}
                record |= {"threads": threads, "length": length, "seconds": None, "ratio": None, "to_softmax": None}
                record["skipped"] = reasons[name]
                if name in times:
                    known[name] = length, Spread.of(times[name]).median
                    record["seconds"] = quartiles([t / (STEPS if work == "decode" else 1) for t in times[name]])
                    if entry.control in times:
                        record["ratio"] = quartiles(ratios(times[entry.control], times[name]))
                    if SOFTMAX in times and entry.control == SDPA:
                        record["to_softmax"] = quartiles(ratios(times[SOFTMAX], times[name]))
                yield record


def call(candidate: Candidate, work: str, inputs: Sequence[torch.Tensor]):
    """What is timed, without arguments."""
    if work != "decode":
        return functools.partial(forward if work == "forward" else forward_backward, candidate, inputs)
    with torch.no_grad():
        step = candidate.step(*inputs)

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def unfit(entry: Entry, work: str, dtype: torch.dtype, heads: Heads, length: int, batch_size: int) -> str | None:
    """Why a candidate is not measured at all here."""
    if work not in entry.works:
        return "not measured"
    if entry.dtypes and dtype not in entry.dtypes:
        return "float32 only"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = Eager.nbytes(batch_size * heads.num_attention_heads, length)
    if isinstance(entry.candidate, Eager) and work != "decode" and needed > memory / 3:
        return f"needs {needed / 2**30:.0f} GiB"
    return None


def too_slow(entry: Entry, work: str, length: int, before: tuple[int, float] | None, budget: float) -> str | None:
    """Why a call is not made, judged by the length before."""
    if before is None or work == "decode":
        return None
    seconds = before[1] * (length / before[0]) ** entry.growth
    allowed = budget * (1 if entry.control else PATIENCE)
    return f"about {seconds:.0f} s a call" if seconds > allowed else None


def peak(name: str, args: argparse.Namespace, heads: Heads, dtype: torch.dtype, length: int) -> float | None:
    """MiB of forward + backward of one candidate, to be called in a new process."""
    torch.set_num_threads(args.threads[0])
    candidate = entries(args.attention, heads, dtype)[name].candidate
    forward_backward(candidate, random_inputs(heads, 64, dtype=dtype))  # what the first call of all allocates
    inputs = random_inputs(heads, length, batch_size=args.batch_size, dtype=dtype)
    return peak_memory_mib(functools.partial(forward_backward, candidate, inputs))


def measure_memory(args: argparse.Namespace, heads: Heads, dtype: torch.dtype) -> Iterator[Record]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_attnswap.tradeoff", "matplotlib.figure"])  # imported once, not by every process
    for length in args.memory_length:
        for name, entry in entries(args.attention, heads, dtype).items():
            reason, mib = unfit(entry, "forward + backward", dtype, heads, length, args.batch_size), None
            if "forward + backward" not in entry.works:
                continue
            if not reason:
                with context.Pool(1) as pool:
                    mib = pool.apply(peak, (name, args, heads, dtype, length))
                reason = None if mib is not None else "this system does not tell"
                note(f"{str(dtype)[6:]}, peak memory, {length} tokens, {name}: {mib and round(mib)} MiB")
            record = {"attention": name, "dtype": str(dtype)[6:], "length": length}
            yield record | {"peak_memory_mib": mib, "skipped": reason}


def tables(report: Record) -> None:
    """Print what was measured."""
    for dtype, work, threads in dict.fromkeys((r["dtype"], r["work"], r["threads"]) for r in report["figures"]):
        figures = [r for r in report["figures"] if (r["dtype"], r["work"], r["threads"]) == (dtype, work, threads)]
        lengths = sorted({r["length"] for r in figures})
        rows, beside = [], []
        for name in dict.fromkeys(r["attention"] for r in figures):
            own = [r for r in figures if r["attention"] == name]
            crossed = [c for c in report["crossovers"] if all(c[k] == own[0][k] for k in KEY)]
            rows.append([name, *map(cell, own), *(says(c["length"], lengths) for c in crossed)])
            if name not in (SDPA, SOFTMAX) and any(r["to_softmax"] for r in own):
                beside.append([name, *(spread(r["to_softmax"]) for r in own)])
        of_what = f"{work}, {dtype}, {threads} threads: times as fast as"
        print_table(
            f"{of_what} SDPA, median and quartiles over the rounds",
            ["", *map(str, lengths), "faster from"],
            rows,
            "SDPA itself: milliseconds. In brackets: why there is no figure.",
        )
        if beside:
            print_table(f"{of_what} this package's own softmax", ["", *map(str, lengths)], beside)
    lengths = sorted({r["length"] for r in report["memory"]})
    for dtype in dict.fromkeys(r["dtype"] for r in report["memory"]):
        rows = []
        for name in dict.fromkeys(r["attention"] for r in report["memory"]):
            own = [r for r in report["memory"] if (r["attention"], r["dtype"]) == (name, dtype)]
            rows.append([name, *(f"[{r['skipped']}]" if r["skipped"] else f"{r['peak_memory_mib']:.0f}" for r in own)])
        print_table(f"peak memory of forward + backward, {dtype}, MiB", ["", *map(str, lengths)], rows)


KEY = ("attention", "control", "work", "dtype", "threads")


def cell(record: Record) -> str:
    if record["skipped"]:
        return f"[{record['skipped']}]"
    if record["control"] is None:
        return spread({k: v if k == "runs" else v * 1e3 for k, v in record["seconds"].items()})
    return spread(record["ratio"]) or f"[no control]\n{record['seconds']['median'] * 1e3:.3g} ms"


def says(crossed: float | None, lengths: Sequence[int]) -> str:
    if crossed is None:
        return "never"
    return f"{'' if crossed > lengths[0] else '<= '}{crossed:.0f}"


def summarise(report: Record) -> bytes:
    """Add the crossovers to the report; the plot."""
    lines: dict[tuple[Any, ...], list[Record]] = {}
    for record in report["figures"]:
        if record["control"] is not None:
            lines.setdefault(tuple(record[k] for k in KEY), []).append(record)
    report["crossovers"], panels = [], {}
    for key, records in lines.items():
        records = [r for r in records if r["ratio"]]
        found = crossover([(r["length"], r["ratio"]["median"]) for r in records])
        report["crossovers"].append(dict(zip(KEY, key, strict=True)) | {"length": found})
        panels.setdefault(f"{key[2]}, {key[3]}, {key[4]} threads", {})[key[0]] = records
    return draw(panels, "times as fast as SDPA")


def main(argv: Sequence[str] | None = None) -> Record:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for attention.json and .png")
    parser.add_argument("--attention", action="append", help=f"may be repeated (default: {' '.join(ATTENTIONS)})")
    parser.add_argument("--length", type=int, action="append", help="may be repeated (default: 128 to 32768)")
    parser.add_argument("--memory_length", type=int, action="append", help="may be repeated (default: 1024, 8192)")
    parser.add_argument("--dtype", action="append", help="may be repeated (default: float32, bfloat16)")
    parser.add_argument("--num_attention_heads", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--num_key_value_heads", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--head_dim", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, action="append", help="may be repeated (default: 1, 2); memory: the first"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=30, help="seconds for all rounds of one length; a call that would take longer "
        f"is left out, a control's from {PATIENCE} times as long (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.attention = list(dict.fromkeys(args.attention or ATTENTIONS))
    args.length, args.memory_length = (
        sorted(set(args.length or LENGTHS)),
        sorted(set(args.memory_length or [1024, 8192])),
    )
    dtypes = [find_dtype(name) for name in dict.fromkeys(args.dtype or ["float32", "bfloat16"])]
    args.threads = list(dict.fromkeys(args.threads or [1, 2]))
    if min(*args.length, *args.memory_length, args.rounds, *args.threads, args.batch_size) < 1:
        raise UsageError("lengths, rounds, threads and batch_size must be at least 1")
    require_empty(args.output_dir)
    torch.set_num_threads(args.threads[0])
    os.environ["OMP_NUM_THREADS"] = str(max(args.threads))  # a peer and its children bring an OpenMP of their own
    for name, reason in peers().items():
        if isinstance(reason, str):
            note(f'{name} is left out: {reason} (pip install --no-build-isolation -e ".[bench-peer]")')
    heads = Heads(args.num_attention_heads, args.num_key_value_heads, args.head_dim)
    settings = {"heads": vars(heads), "batch_size": args.batch_size, "rounds": args.rounds, "budget_s": args.budget}
    there = [name for name, candidate in peers().items() if not isinstance(candidate, str)]
    report = heading(argv, **settings, threads=args.threads, peers=there)
    report["memory"] = [record for dtype in dtypes for record in measure_memory(args, heads, dtype)]
    with watch() as ran:
        report["figures"] = [r for dtype in dtypes for n in args.threads for r in measure(args, heads, dtype, n)]
    report["kernels"] = native.describe()
    report["backends"] = {op: sorted(backends) for op, backends in ran.items()}
    note(f"backends that ran: {told(ran) or 'none of ours'}; {report['kernels']}")
    picture = summarise(report)
    with whole_folder(args.output_dir) as folder:
        (folder / "attention.json").write_text(json.dumps(report, indent=1))
        (folder / "attention.png").write_bytes(picture)
    tables(report)
    return report


if __name__ == "__main__":
    with one_line_errors("attention"):
        main()
