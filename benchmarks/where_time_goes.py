"""Where the time of one attention goes: products, passes over memory, copies, and the overhead of many small calls.

    python benchmarks/where_time_goes.py --attention relu_power:p=8 --attention hedgehog+window --length 2048

Shares of the time of one thread, by torch's profiler, which itself makes small calls look dearer than they are; the
milliseconds are measured without it.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Sequence

import torch
from figures import print_table
from torch.profiler import ProfilerActivity, profile

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.benchmark.attention import Variant, forward, forward_backward, random_inputs
from hf_attnswap.errors import one_line_errors
from hf_attnswap.sources.models import find_dtype
from hf_attnswap.tradeoff import Arm

HEADS = Heads(9, 3, 64)  # of SmolLM2-135M
ROUNDS = 5
KINDS = {
    "products": {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "matmul"},
    "copies": {"copy_", "cat", "stack", "_to_copy", "clone", "contiguous", "constant_pad_nd", "fill_"},
    "views and allocation": {
        "slice", "view", "as_strided", "reshape", "_reshape_alias", "select", "transpose", "permute", "expand", "empty",
        "empty_strided", "flatten", "unflatten", "narrow", "unsqueeze", "squeeze", "resize_", "t", "to", "new_empty",
        "empty_like", "zeros", "new_ones", "new_zeros", "unfold", "_unsafe_view",
    },
}  # fmt: skip


def shares(call) -> dict[str, float]:
    """Of the profiled time, the share of each kind; what no operator of torch accounts for is `Python`."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        for _ in range(ROUNDS):
            call()
        wall = (time.perf_counter() - start) * 1e6
    totals = dict.fromkeys([*KINDS, "passes over numbers"], 0.0)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        if event.key.startswith("aten::"):
            kind = next((kind for kind, names in KINDS.items() if name in names), "passes over numbers")
            totals[kind] += event.self_cpu_time_total
    totals["Python"] = max(0.0, wall - sum(totals.values()))
    return {kind: total / sum(totals.values()) for kind, total in totals.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", action="append", required=True, help="may be repeated")
    parser.add_argument("--length", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--bidirectional", action="store_true", help="every token attends to every other")
    parser.add_argument("--backward", action="store_true", help="forward + backward")
    parser.add_argument("--decode", action="store_true", help="one step after so many tokens")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dtype = find_dtype(args.dtype)
    rows = []
    for name in args.attention:
        arm = Arm.parse(name)
        variant = attentions.get(arm.attention)(HEADS, **arm.options).to(dtype)
        candidate = Variant(variant, causal=not args.bidirectional)
        inputs = random_inputs(HEADS, args.length, dtype=dtype)
        if args.decode:
            with torch.no_grad():
                call = candidate.step(*inputs)
        else:
            call = functools.partial(forward_backward if args.backward else forward, candidate, inputs)
        with torch.set_grad_enabled(args.backward):
            times = []
            for _ in range(4 * ROUNDS):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            found = shares(call)
        milliseconds = f"{statistics.median(times) * 1e3:.3g}"
        rows.append([name, milliseconds, *(f"{share:.0%}" for share in found.values())])
    what = "one decode step after" if args.decode else "forward + backward of" if args.backward else "forward of"
    direction = "bidirectional" if args.bidirectional else "causal"
    print_table(f"{what} {args.length} tokens, {direction}, {args.dtype}", ["attention", "ms", *found], rows)


if __name__ == "__main__":
    with one_line_errors("where_time_goes"):
        main()
