"""Measure on one GPU what this project is about, in under five minutes: kernels, whole models, training, and the tests.

    python benchmarks/gpu_check.py --output gpu_check.json

Without a GPU it says so and ends with status 2. --tiny runs the same parts at tiny sizes on any device, for tests; its
figures mean nothing. Times are medians of rounds in which the candidates take turns. The file is written after each
part, so that it has what was measured when a part fails.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_attnswap
from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.benchmark.attention import Variant, forward, forward_backward, random_inputs
from hf_attnswap.benchmark.measure import interleaved
from hf_attnswap.ops.backends import watch
from hf_attnswap.sources.files import write_whole

ROOT = Path(__file__).parents[1]
VARIANTS = ("relu", "relu_norm", "sigmoid", "relu_power", "elu", "hedgehog", "window", "hedgehog+window")
# Heads of SmolLM2-135M and of Llama-3-8B, with the texts at a time and the lengths.
SHAPES = {
    "smollm2": (Heads(9, 3, 64), 8, (2048, 8192, 16384)),
    "llama8b": (Heads(32, 8, 128), 1, (2048, 16384, 65536)),
}
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=1 << 17, tie_word_embeddings=True,
)  # fmt: skip
TINY_MODEL = SMOLLM2 | dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2)  # fmt: skip


def tests(seconds: float) -> dict:
    """Run the tests of the kernels and of what stands on them on the GPU, at most so many seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "tests/ops",
               "tests/attentions", "tests/masks", "tests/integration/test_models.py"]  # fmt: skip
    environment = {**os.environ, "ATTNSWAP_TEST_DEVICE": "cuda", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        said = done.stdout.strip().splitlines()
        return {"passed": done.returncode == 0, "summary": said[-1] if said else done.stderr[-500:],
                "failures": [line for line in said if line.startswith(("FAILED", "ERROR"))]}  # fmt: skip
    except subprocess.TimeoutExpired as ended:
        said = (ended.stdout or b"").decode(errors="replace").splitlines()
        return {"passed": None, "summary": f"not through after {seconds:.0f} s", "failures": said[-3:]}


class Softmax:
    """Torch's attention by one of its kernels."""

    def __init__(self, kernel: SDPBackend | None):
        self.kernel = kernel

    def __call__(self, query, key, value):
        if self.kernel is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        with sdpa_kernel(self.kernel):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def kernels(device: str, dtype: torch.dtype, shapes: dict, budget_s: float) -> list[dict]:
    """Time each variant's attention beside the kernels of SDPA: seconds, and times as fast as the better of these."""
    rows, deadline = [], time.perf_counter() + budget_s
    controls = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    controls = controls if device == "cuda" else {"sdpa": None}
    for shape, (heads, batch, lengths) in shapes.items():
        for work in (forward, forward_backward):
            for length in lengths:
                if time.perf_counter() > deadline:
                    rows.append({"shape": shape, "work": work.__name__, "length": length, "error": "out of time"})
                    continue
                inputs = random_inputs(heads, length, batch_size=batch, dtype=dtype, device=device)
                candidates = {name: Softmax(kernel) for name, kernel in controls.items()}
                for name in VARIANTS:
                    attention = attentions.get(name)(heads).to(device, dtype)
                    candidates[name] = Variant(attention)
                rows += timed(candidates, controls, inputs, work, device, shape, length)
    return rows


def timed(candidates, controls, inputs, work, device, shape, length) -> list[dict]:
    """Return a row per candidate; one that fails has the reason in its row."""
    rows, running = [], {}
    for name, candidate in candidates.items():
        row = {"shape": shape, "work": work.__name__, "length": length, "attention": name}
        rows.append(row)
        try:
            with watch() as ran:
                work(candidate, inputs)
            row["backends"] = {op: sorted(names) for op, names in ran.items()}
            running[name] = lambda candidate=candidate: work(candidate, inputs)
        except Exception as error:  # a kernel that does not run is a result
            row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    times = interleaved(running, 5, device, budget_s=4)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min((medians[name] for name in controls if name in medians), default=None)
    for row in rows:
        if row["attention"] in medians:
            row["seconds"] = medians[row["attention"]]
            row["ratio"] = None if best is None else best / row["seconds"]
    return rows


def model_of(settings: dict, attention: str | None, device: str, dtype: torch.dtype):
    """Return a model of random weights at these sizes, its attention swapped where one is named."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=dtype).to(device).eval()
    if attention is not None:
        hf_attnswap.swap(model, attention)
    return model


@torch.no_grad()
def models(settings: dict, device: str, dtype: torch.dtype, sizes, budget_s: float) -> list[dict]:
    """Time the prefill of a whole model, softmax beside each variant in the same rounds."""
    rows, deadline = [], time.perf_counter() + budget_s
    names = (None, "elu", "relu_norm", "hedgehog+window", "relu_power")
    built = {name or "softmax": model_of(settings, name, device, dtype) for name in names}
    for batch, length in sizes:
        if time.perf_counter() > deadline:
            rows.append({"batch": batch, "length": length, "error": "out of time"})
            continue
        ids = torch.randint(3, settings["vocab_size"], (batch, length), device=device)
        runs = {n: lambda m=m: m.model(ids, use_cache=False) for n, m in built.items()}  # noqa: B023 (run at once)
        times = {name: statistics.median(s) for name, s in interleaved(runs, 5, device, budget_s=8).items()}
        rows += [{"batch": batch, "length": length, "attention": name, "seconds": seconds,
                  "ratio": times["softmax"] / seconds} for name, seconds in times.items()]  # fmt: skip
    return rows


def training(settings: dict, device: str, dtype: torch.dtype, batch: int, length: int, steps: int) -> dict:
    """Return the tokens per second of distillation: a softmax teacher, a hybrid student, AdamW in bfloat16 autocast."""
    teacher = model_of(settings, None, device, dtype)
    student = model_of(settings, "hedgehog+window", device, torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def step():
        ids = torch.randint(3, settings["vocab_size"], (batch, length), device=device)
        with torch.no_grad():
            target = teacher(ids).logits.float().log_softmax(-1)
        with torch.autocast(device, torch.bfloat16):
            logits = student(ids).logits
        loss = torch.nn.functional.kl_div(logits.float().log_softmax(-1), target, log_target=True, reduction="sum")
        (loss / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = interleaved({"step": step}, steps, device, budget_s=30)["step"]
    return {"batch": batch, "length": length, "attention": "hedgehog+window",
            "tokens_per_second": batch * length / statistics.median(times)}  # fmt: skip


def main(given: list[str] | None = None) -> dict:
    """Run all parts and write the file.

    Raises:
        SystemExit: there is no GPU, and --tiny was not given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on any device, without the tests")
    args = parser.parse_args(given)
    if not torch.cuda.is_available() and not args.tiny:
        print(f"gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none here", file=sys.stderr)
        raise SystemExit(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes, settings, sizes = SHAPES, SMOLLM2, ((8, 2048), (4, 8192), (1, 32768))
    rate = (16, 1024, 5)
    if args.tiny:
        shapes, settings, sizes = {"tiny": (Heads(2, 1, 8), 1, (16,))}, TINY_MODEL, ((1, 16),)
        rate = (1, 16, 1)
    started = time.perf_counter()
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "hf_attnswap": hf_attnswap.__version__},
    }
    parts = {
        "kernels": lambda: kernels(device, dtype, shapes, 80),
        "models": lambda: models(settings, device, dtype, sizes, 50),
        "training": lambda: training(settings, device, dtype, *rate),
        "tests": lambda: None if args.tiny else tests(max(20.0, 285 - (time.perf_counter() - started))),
    }
    for name, part in parts.items():
        try:
            report[name] = part()
        except Exception as error:  # the other parts still run
            report[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        report["seconds"] = time.perf_counter() - started
        write_whole(args.output, json.dumps(report, indent=1).encode())
        print(f"{name}: {json.dumps(report[name])[:2000]}", flush=True)
    return report


if __name__ == "__main__":
    result = main()
    sys.exit(bool(any(isinstance(part, dict) and "error" in part for part in result.values())))
