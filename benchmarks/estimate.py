"""How near an estimate is: a model that reads, writes and is distilled on this CPU, beside what was predicted of it.

Each case is predicted from rates that are measured anew right before it runs, and the rounds go through all cases, so
that prediction and measurement share the noise of the machine. Both are seconds of CPU time of one thread, which other
processes hardly change; memory is that of the process at its peak.

    python benchmarks/estimate.py --model_name_or_path SmolLM2.gguf --plan benchmarks/plans/smollm2-135m-quarter.yaml \\
        --output docs/estimate.json --page docs/estimate.md
"""

import argparse
import copy
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import Record, heading, named, note, print_table
from transformers import DynamicCache, PreTrainedModel

from hf_attnswap import UsageError, swap
from hf_attnswap.benchmark.generation import decode, filled_cache
from hf_attnswap.benchmark.measure import peak_memory_mib
from hf_attnswap.errors import one_line_errors
from hf_attnswap.estimate import steps
from hf_attnswap.estimate.devices import Device, seconds
from hf_attnswap.estimate.layers import as_softmax, cache_bytes, layers_of
from hf_attnswap.estimate.measured import Measured
from hf_attnswap.estimate.trace import Trace
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.sources.files import write_whole
from hf_attnswap.sources.models import load
from hf_attnswap.sources.plans import read_plan
from hf_attnswap.tradeoff import share_weights
from hf_attnswap.training.distill import distillation_loss
from hf_attnswap.training.teacher import frozen

PREFILL = [(1, 512), (2, 256), (4, 128)]
DECODE = [(1, 2048), (2, 256), (4, 512)]
DISTILL = [(1, 256), (2, 128), (4, 64)]
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def cpu_seconds(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Return the seconds of CPU time of one call; those of all threads, of which there is one here."""
    started = time.process_time()
    call()
    return time.process_time() - started


def cases() -> Iterator[tuple[str, int, int]]:
    for work, sizes in (("prefill", PREFILL), ("decode", DECODE), ("distill", DISTILL)):
        for batch, length in sizes:
            yield work, batch, length


@functools.cache
def counted_once(work: str, counted: PreTrainedModel, batch: int, length: int) -> Trace:
    """Return what the model does, all but its attention; the same in every round."""
    if work == "distill":
        return steps.distilling(counted, batch, length).step
    return steps.reading(counted, batch, 1 if work == "decode" else length)


def predicted(work: str, counted: PreTrainedModel, batch: int, length: int, device: Device) -> float:
    """Return the seconds that the estimate gives for one case.

    Args:
        counted: the model on the meta device.
    """
    layers, dtype = layers_of(counted), torch.float32
    body = seconds(counted_once(work, counted, batch, length), device, dtype)

    def attention(layers, backward=False):
        return sum(
            count * device.attention(layer.attention, batch, length, layer.window, dtype, backward)
            for layer, count in layers
        )

    if work == "prefill":
        return body + attention(layers)
    if work == "decode":
        return body + sum(count * device.step(layer.attention, batch, length, layer.window, dtype)
                          for layer, count in layers)  # fmt: skip
    return body + attention(layers) + attention(layers, backward=True) + attention(as_softmax(layers))


def measured(work: str, model: PreTrainedModel, batch: int, length: int) -> float:
    """Return the seconds that the model takes, after a short call: the median of 7 steps of writing, else of one."""
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))
    few = tokens[:, :16]
    if work == "prefill":

        @torch.no_grad()
        def call(text=tokens):
            cache = DynamicCache(config=model.config)
            model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1)

    elif work == "decode":
        cache = filled_cache(model, length)
        if batch > 1:
            cache.batch_repeat_interleave(batch)

        def call(text=tokens):
            decode(model, cache, text[:, :1], 1)

    else:
        call = distillation(model, tokens)
    call(few)
    return statistics.median(cpu_seconds(call) for _ in range(7 if work == "decode" else 1))


def distillation(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[..., None]:
    """Return a step of distillation with all weights, on these tokens or on others, as `training.loop` has it."""
    student, teacher = copy.deepcopy(model), frozen(model)
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def step(text=tokens) -> None:
        distillation_loss(student, teacher, text).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(models: dict[str, PreTrainedModel], rounds: int) -> Iterator[list[Record]]:
    """Yield the figures of all rounds so far, after each."""
    counted = {name: without_values(model) for name, model in models.items()}
    found: dict[tuple, list[tuple[float, float]]] = {}
    for turn in range(rounds):
        for work, batch, length in cases():
            for name, model in models.items():
                device = Measured(torch.device("cpu"), cpu_seconds)
                pair = predicted(work, counted[name], batch, length, device), measured(work, model, batch, length)
                found.setdefault((work, batch, length, name), []).append(pair)
                note(f"round {turn + 1}: {work} of {batch} x {length}, {name}: predicted {pair[0]:.3g} s, "
                     f"measured {pair[1]:.3g} s, {pair[0] / pair[1]:.2f}")  # fmt: skip
        yield figures(found)


def figures(found: dict[tuple, list[tuple[float, float]]]) -> list[Record]:
    return [
        {
            "work": work,
            "batch": batch,
            "length": length,
            "attention": name,
            "predicted_s": statistics.median(p for p, _ in pairs),
            "measured_s": statistics.median(m for _, m in pairs),
            "ratio": statistics.median(p / m for p, m in pairs),
            "ratios": [round(p / m, 3) for p, m in pairs],
        }
        for (work, batch, length, name), pairs in found.items()
    ]


def without_values(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy on the meta device, all of whose weights train: those of a teacher share them, and do not."""
    return copy.deepcopy(model).to("meta").requires_grad_(True)


def memory(models: dict[str, PreTrainedModel]) -> list[Record]:
    """Return the bytes of caches, and the peak of a distillation step, predicted and measured."""
    found = []
    for name, model in models.items():
        counted = without_values(model)
        for length in (256, 1024):
            pair = cache_bytes(layers_of(counted), length, torch.float32), cache_nbytes(filled_cache(model, length))
            found.append({"what": f"cache of {length} tokens", "attention": name, "predicted_mib": pair[0] / 2**20,
                          "measured_mib": pair[1] / 2**20})  # fmt: skip
        step = distillation(model, torch.zeros(1, 256, dtype=torch.long))
        step(torch.zeros(1, 16, dtype=torch.long))  # AdamW makes its tensors
        peak = peak_memory_mib(step)
        if peak is not None:
            training = steps.distilling(counted, 1, 256)
            found.append({"what": "step of distill, 1 x 256, beside weights and optimiser", "attention": name,
                          "predicted_mib": training.step.peak / 2**20, "measured_mib": peak})  # fmt: skip
    return found


def rows_of(report: Record) -> tuple[list[list[str]], list[list[str]]]:
    times = [
        [r["work"], r["attention"], f"{r['batch']} x {r['length']}", f"{r['predicted_s']:.3g}",
         f"{r['measured_s']:.3g}", f"{r['ratio']:.2f}", f"{min(r['ratios']):.2f} to {max(r['ratios']):.2f}"]
        for r in report["figures"]
    ]  # fmt: skip
    sizes = [
        [r["what"], r["attention"], f"{r['predicted_mib']:.1f}", f"{r['measured_mib']:.1f}",
         f"{r['predicted_mib'] / r['measured_mib']:.2f}"]
        for r in report["memory"]
    ]  # fmt: skip
    return times, sizes


TIMES = ["work", "attention", "texts x tokens", "predicted s", "measured s", "ratio", "of the rounds"]
SIZES = ["memory", "attention", "predicted MiB", "measured MiB", "ratio"]


def markdown(report: Record) -> str:
    """Return both tables for the page."""

    def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    times, sizes = rows_of(report)
    told = f"{report['model']}, {report['machine']['processor']}, one thread, float32, {report['rounds']} rounds"
    return f"{told}, {report['date'][:10]}:\n\n{table(TIMES, times)}\n\n{table(SIZES, sizes)}"


def main(argv: Sequence[str] | None = None) -> Record:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--plan", required=True, help="a plan.yaml for it")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file for the figures")
    parser.add_argument("--page", type=Path, help=f"a page whose part between {BEGIN} and {END} becomes the tables")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    page = None if args.page is None else args.page.read_text()
    if page is not None and not -1 < page.find(BEGIN) < page.find(END):
        raise UsageError(f"{args.page} has no part between {BEGIN} and {END}")
    torch.set_num_threads(1)
    model, _ = load(args.model_name_or_path, device="cpu")
    plan = read_plan(args.plan)
    plan.require(model)
    models = {"softmax": swap(share_weights(model), "softmax"), "plan": swap(share_weights(model), plan.swap)}
    report = heading(argv, model=named(args.model_name_or_path), plan=named(args.plan))
    report["memory"] = memory(models)
    for turn, found in enumerate(measure(models, args.rounds), start=1):  # what was cut off has its rounds so far
        report |= {"rounds": turn, "figures": found}
        write_whole(args.output, (json.dumps(report, indent=1) + "\n").encode())
        if page is not None:
            before, _, rest = page.partition(BEGIN)
            after = rest.partition(END)[2]
            write_whole(args.page, f"{before}{BEGIN}\n{markdown(report)}\n{END}{after}".encode())
    times, sizes = rows_of(report)
    print_table("seconds of CPU time, medians; ratio of prediction to measurement", TIMES, times)
    print_table("memory", SIZES, sizes)
    return report


if __name__ == "__main__":
    with one_line_errors("estimate"):
        main()
