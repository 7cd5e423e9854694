"""Measure on one GPU what this project is about, in under five minutes: kernels, whole models, training, and the tests.

    python benchmarks/gpu_check.py --output gpu_check.json

Without a GPU it says so and ends with status 2. --tiny runs the same parts at tiny sizes on any device, for tests; its
figures mean nothing. Times are medians of rounds in which the candidates take turns. Triton's compiler takes seconds
for a kernel, so processes beside this one compile all kernels first. A whole model is timed as it is called, and as a
CUDA graph, which leaves out the time that Python takes to launch kernels. The file is written after each part, so that
it has what was measured when a part fails.
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
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import hf_attnswap
from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.benchmark.attention import Variant, forward, forward_backward, random_inputs
from hf_attnswap.benchmark.measure import interleaved
from hf_attnswap.ops.backends import watch
from hf_attnswap.sources.files import write_whole
from hf_attnswap.training.distill import distillation_loss

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "models", "decoding", "training", "tests")
VARIANTS = ("relu", "relu_norm", "sigmoid", "relu_power", "elu", "hedgehog", "window", "hedgehog+window")
# Calls in one graph of a kernel.
CALLS = 4
# Heads of SmolLM2-135M and of Llama-3-8B, with the texts at a time and the lengths.
SHAPES = {
    "smollm2": (Heads(9, 3, 64), 8, (2048, 8192, 16384)),
    "llama8b": (Heads(32, 8, 128), 1, (2048, 16384, 65536)),
}
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=1 << 17, tie_word_embeddings=True,
)  # fmt: skip
# Softmax in a quarter of the key/value groups, elsewhere what is named.
PLANS = {
    "plan of windows": ("window", {"window": 128}),
    "plan of hybrids": ("hedgehog+window", {"window": 64, "unrotate": True, "half_life": 512}),
}
KEPT = yaml.safe_load((ROOT / "benchmarks/plans/smollm2-135m-quarter.yaml").read_text())["keep"]
TINY_MODEL = SMOLLM2 | dict(vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=27,
                            num_attention_heads=6)  # fmt: skip


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


def graph_of(run, calls: int = CALLS):
    """Return a function that replays so many calls of `run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def kernels(device: str, dtype: torch.dtype, shapes: dict, budget_s: float) -> list[dict]:
    """Time each variant's attention beside the kernels of SDPA: seconds, and times as fast as the better of these.

    On a GPU each is a CUDA graph of several calls: the time that Python takes to launch a short kernel is left out.
    """
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
            if device == "cuda":
                running[name] = graph_of(running[name])
        except Exception as error:  # a kernel that does not run is a result
            row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    times = interleaved(running, 5, device, budget_s=4)
    calls = CALLS if device == "cuda" else 1
    medians = {name: statistics.median(seconds) / calls for name, seconds in times.items()}
    best = min((medians[name] for name in controls if name in medians), default=None)
    for row in rows:
        if row["attention"] in medians:
            row["seconds"] = medians[row["attention"]]
            row["ratio"] = None if best is None else best / row["seconds"]
    return rows


def compile_part(part: int, parts: int, shapes: dict, device: str, dtype: torch.dtype) -> None:
    """Run every `parts`-th kernel that `kernels` times, once, so that Triton's cache on the disk has it."""
    cases = [(shape, name) for shape in shapes for name in VARIANTS]
    for shape, name in cases[part::parts]:
        heads, batch, lengths = shapes[shape]
        candidate = Variant(attentions.get(name)(heads).to(device, dtype))
        for length in lengths[:2]:
            try:
                forward_backward(candidate, random_inputs(heads, length, batch_size=batch, dtype=dtype, device=device))
            except Exception as error:  # which its row in the table says too
                print(f"{shape} {name}: {error}", file=sys.stderr)


def model_of(settings: dict, attention: str | None, device: str, dtype: torch.dtype):
    """Return a model of random weights at these sizes, swapped to a variant or to one of `PLANS` where one is named."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=dtype).eval()
    if attention in PLANS:
        name, options = PLANS[attention]
        hf_attnswap.swap(model, name, keep=KEPT, **options)
    elif attention is not None:
        hf_attnswap.swap(model, attention)
    return model.to(device)


@torch.no_grad()
def models(settings: dict, device: str, dtype: torch.dtype, sizes, budget_s: float) -> list[dict]:
    """Time the prefill of a whole model, softmax beside each variant in the same rounds, as called and as a graph."""
    rows, deadline = [], time.perf_counter() + budget_s
    names = (None, "elu", "hedgehog+window", "relu_norm", "relu_power", *PLANS)
    built = {name or "softmax": model_of(settings, name, device, dtype) for name in names}
    for batch, length in sizes:
        ids = torch.randint(3, settings["vocab_size"], (batch, length), device=device)
        calls = {n: lambda m=m: m.model(ids, use_cache=False) for n, m in built.items()}  # noqa: B023 (run at once)
        ways = {"called": calls}
        if device == "cuda":
            try:
                ways["graph"] = {name: graph_of(run, calls=1) for name, run in calls.items()}
            except RuntimeError as error:
                rows.append({"batch": batch, "length": length, "way": "graph", "error": str(error)[:200]})
        for way, runs in ways.items():
            if time.perf_counter() > deadline:
                rows.append({"batch": batch, "length": length, "way": way, "error": "out of time"})
                continue
            times = {name: statistics.median(s) for name, s in interleaved(runs, 5, device, budget_s=4).items()}
            rows += [{"batch": batch, "length": length, "way": way, "attention": name, "seconds": seconds,
                      "ratio": times["softmax"] / seconds} for name, seconds in times.items()]  # fmt: skip
        ways.clear()
    return rows


@torch.no_grad()
def decoding(settings: dict, device: str, dtype: torch.dtype, batch: int, length: int) -> list[dict]:
    """Time a step of generation after `length` tokens, in a cache that grows, softmax beside variants with a state.

    The keys and values of softmax are random numbers. A state has the same size after any text, so that of 512 tokens
    or fewer stands for it.
    """
    built = {name or "softmax": model_of(settings, name, device, dtype) for name in (None, "elu", "hedgehog+window")}
    config = built["softmax"].config
    token = torch.randint(3, settings["vocab_size"], (batch, 1), device=device)
    text = token.expand(-1, min(length, 512))
    pasts = {n: m.model(text, use_cache=True).past_key_values for n, m in built.items() if n != "softmax"}
    pasts["softmax"] = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        both = torch.randn(2, batch, config.num_key_value_heads, length, config.head_dim, device=device, dtype=dtype)
        pasts["softmax"].update(*both, layer)
    runs = {n: lambda m=m, n=n: m.model(token, past_key_values=pasts[n], use_cache=True) for n, m in built.items()}
    times = {name: statistics.median(s) for name, s in interleaved(runs, 9, device, warmup=3, budget_s=10).items()}
    return [{"batch": batch, "length": length, "attention": name, "tokens_per_second": batch / seconds,
             "ratio": times["softmax"] / seconds} for name, seconds in times.items()]  # fmt: skip


def training(settings: dict, device: str, dtype: torch.dtype, batch: int, length: int, steps: int) -> list[dict]:
    """Return the tokens per second of distilling the plans as the stage `distill` does, in bfloat16 autocast."""
    teacher = model_of(settings, None, device, torch.float32).requires_grad_(False)
    students = {name: model_of(settings, name, device, torch.float32).train() for name in PLANS}
    ids = torch.randint(3, settings["vocab_size"], (batch, length), device=device)

    def stepper(student):
        student.get_input_embeddings().requires_grad_(False)
        weights = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

        def step():
            with torch.autocast(device, torch.bfloat16):
                loss = distillation_loss(student, teacher, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    times = interleaved({name: stepper(m) for name, m in students.items()}, steps, device, budget_s=15)
    return [{"batch": batch, "length": length, "attention": name,
             "tokens_per_second": batch * length / statistics.median(seconds)} for name, seconds in times.items()
            ]  # fmt: skip


def main(given: list[str] | None = None) -> dict:
    """Run all parts and write the file.

    Raises:
        SystemExit: there is no GPU, and --tiny was not given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on any device, without the tests")
    parser.add_argument("--part", action="append", choices=PARTS, help="run this part alone; may be repeated")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # i/n: what a process beside this one does
    args = parser.parse_args(given)
    if not torch.cuda.is_available() and not args.tiny:
        print(f"gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none here", file=sys.stderr)
        raise SystemExit(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes, settings, sizes = SHAPES, SMOLLM2, ((8, 2048), (4, 8192), (1, 32768))
    rate, after = (16, 1024, 5), (16, 65536)
    if args.tiny:
        shapes, settings, sizes = {"tiny": (Heads(2, 1, 8), 1, (16,))}, TINY_MODEL, ((1, 16),)
        rate, after = (1, 16, 1), (1, 16)
    if args.compile:
        compile_part(*map(int, args.compile.split("/")), shapes, device, dtype)
        return {}
    started = time.perf_counter()
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "hf_attnswap": hf_attnswap.__version__},
    }
    if device == "cuda":
        report["compiled"] = compile_all(min(14, os.cpu_count() or 1))
    parts = {
        "kernels": lambda: kernels(device, dtype, shapes, 45),
        "models": lambda: models(settings, device, dtype, sizes, 30),
        "decoding": lambda: decoding(settings, device, dtype, *after),
        "training": lambda: training(settings, device, dtype, *rate),
        "tests": lambda: None if args.tiny else tests(max(20.0, 285 - (time.perf_counter() - started))),
    }
    for name in args.part or PARTS:
        try:
            report[name] = parts[name]()
        except Exception as error:  # the other parts still run
            report[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        report["seconds"] = time.perf_counter() - started
        write_whole(args.output, json.dumps(report, indent=1).encode())
        print(f"{name}: {json.dumps(report[name])[:2000]}", flush=True)
    return report


def compile_all(processes: int) -> dict:
    """Let processes beside this one compile the kernels; return how long that took."""
    started = time.perf_counter()
    commands = [[sys.executable, __file__, "--compile", f"{i}/{processes}"] for i in range(processes)]
    for running in [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]:
        running.communicate()
    return {"processes": processes, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    result = main()
    sys.exit(bool(any(isinstance(part, dict) and "error" in part for part in result.values())))
