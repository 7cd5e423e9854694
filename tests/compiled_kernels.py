"""Compile the Triton kernels ahead of time for GPUs that are not there: python compiled_kernels.py 80,90 CASE...

Prints a line of JSON per kernel: registers per thread, bytes spilled and shared memory, as ptxas says. The forms run on
tensors of the CPU; what they would launch is compiled instead. Without cases, all of them; `--list` names them.
"""

import contextlib
import io
import json
import re
import sys

import torch

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.attentions.elu import ELU
from hf_attnswap.attentions.hedgehog import hedgehog_beside_softmax, hedgehog_features
from hf_attnswap.masks import Mask
from hf_attnswap.ops import gpu
from hf_attnswap.ops.spec import FeatureMap

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
         torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64"}  # fmt: skip


def compiled(kernel, arguments, constants, arch):
    """Compile what a launch would run, and return what ptxas says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature, attributes = {}, {}
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    for i, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif torch.is_tensor(value):
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in kernel.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in kernel.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = log.getvalue()
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    return {
        "kernel": kernel.fn.__module__.split("ops.")[1] + "." + kernel.fn.__name__, "arch": arch,
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))), "spilled": sum(spilled),
        "shared": result.metadata.shared, "warps": options.get("num_warps", 4),
    }  # fmt: skip


def qkv(dtype, dim, length=512, heads=6, kv_heads=2):
    return [torch.zeros(2, h, length, dim, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def scores(name, dtype, dim, valid=None, learning=True):
    from hf_attnswap.ops.scores import triton as form

    attention = attentions.get(name)(Heads(6, 2, dim))
    mask = Mask(512, 512, valid=None if valid is None else torch.ones(2, 512, dtype=torch.bool))
    with torch.set_grad_enabled(learning):
        out = form.run(*qkv(dtype, dim), mask, 0.1, attention.activation(), None, dtype)
    if learning:
        out.sum().backward()


def maps(name, dim):
    if name == "elu":
        return [ELU, ELU]
    deltas = [torch.zeros(h, dim, dim, requires_grad=True) for h in (6, 2)]
    return [FeatureMap(name, hedgehog_features, tensors={"delta": d}, beside=hedgehog_beside_softmax) for d in deltas]


def fading(decays):
    return torch.zeros(2, requires_grad=True) if decays else None


def linear(name, dtype, dim, length=512, decays=False):
    from hf_attnswap.ops.linear import triton as form

    state = torch.zeros(2, 2, dim * (2 if name == "hedgehog" else 1), dim + 1)
    given = *qkv(dtype, dim, length), *maps(name, dim), 1.0, None, state, 1e-6, 64, True, fading(decays)
    if length > 1:
        form.run(*given)[0].sum().backward()
    else:
        with torch.no_grad():
            form.run(*given)


def gated(name, dtype, dim, length=512, gates=True):
    """Gated linear attention, or the delta rule with or without gates: with a gradient, or a token after a state."""
    from hf_attnswap.ops.delta import triton as delta
    from hf_attnswap.ops.gated import triton as form

    tensors, state = qkv(dtype, dim, length), torch.zeros(2, 2, dim, dim + (name == "gated"))
    numbers = [torch.zeros(2, 2, length, requires_grad=True) for _ in range(2)]
    with torch.set_grad_enabled(length > 1):
        if name == "gated":
            out = form.run(*tensors, numbers[0], state, 1e-6, 64)[0]
        else:
            out = delta.gated_or_not(*tensors, numbers[0], numbers[1] if gates else None, state)[0]
    if length > 1:
        out.sum().backward()


def near(name, dtype, dim, length=512, decays=False):
    """The window, or a hybrid with the map `name`: with and without a gradient, or a token after a state."""
    from hf_attnswap.ops.hybrid import triton as hybrid
    from hf_attnswap.ops.sliding import HybridState, WindowState
    from hf_attnswap.ops.window import triton as window

    def run(state=None):
        tensors = qkv(dtype, dim, length)
        if name == "window":
            return window.run(*tensors, 0.1, 64, 4, None, state, False, None)[0]
        mix, old = torch.zeros(6, requires_grad=True), state and HybridState(state, states)
        return hybrid.run(*tensors, *maps(name, dim), mix, 0.1, 64, 4, None, old, False, None, fading(decays))[0]

    slots = [torch.zeros(2, 2, 68, dim, dtype=dtype) for _ in range(2)]
    states = torch.zeros(2, 2, dim * (2 if name == "hedgehog" else 1), dim + 1)
    with torch.no_grad():
        run(WindowState(*slots, torch.full((2,), 99)) if length == 1 else None)
    if length > 1:
        run().sum().backward()


POPULAR = ("relu", "relu_norm", "relu_power", "sigmoid")
BF16, F32 = torch.bfloat16, torch.float32
CASES = {
    **{f"scores {n} {d}": (scores, n, BF16, d) for n in POPULAR for d in (64, 128)},
    **{f"scores {n} 64": (scores, n, BF16, 64) for n in ("relu2", "softplus", "gelu", "softmax")},
    "scores relu_norm 64 forward": (scores, "relu_norm", BF16, 64, None, False),
    "scores relu_norm 64 padded": (scores, "relu_norm", BF16, 64, True),
    "scores relu_norm 256": (scores, "relu_norm", BF16, 256),
    "scores relu_norm 64 float32": (scores, "relu_norm", F32, 64),
    "scores relu_norm 256 float32": (scores, "relu_norm", F32, 256),
    **{f"linear {n} {d}": (linear, n, BF16, d) for n in ("elu", "hedgehog") for d in (64, 128)},
    "linear elu 256": (linear, "elu", BF16, 256),
    "linear elu 64 float32": (linear, "elu", F32, 64),
    "linear elu 64 decay": (linear, "elu", BF16, 64, 512, True),
    "linear elu 256 decay": (linear, "elu", BF16, 256, 512, True),
    "linear elu 64 float32 decay": (linear, "elu", F32, 64, 512, True),
    "linear elu 64 decay step": (linear, "elu", BF16, 64, 1, True),
    "linear elu 64 step": (linear, "elu", BF16, 64, 1),
    "linear hedgehog 64 step": (linear, "hedgehog", BF16, 64, 1),
    **{f"gated {n} {d}": (gated, n, BF16, d) for n in ("gated", "delta") for d in (64, 128, 256)},
    **{f"gated {n} 64 float32": (gated, n, F32, 64) for n in ("gated", "delta")},
    "gated delta 64 plain": (gated, "delta", BF16, 64, 512, False),
    **{f"gated {n} 64 step": (gated, n, BF16, 64, 1) for n in ("gated", "delta")},
    **{f"near {n} {d}": (near, n, BF16, d) for n in ("window", "hedgehog") for d in (64, 128)},
    "near window 256": (near, "window", BF16, 256),
    "near window 64 float32": (near, "window", F32, 64),
    "near elu 64": (near, "elu", BF16, 64),
    "near hedgehog 64 decay": (near, "hedgehog", BF16, 64, 512, True),
    "near hedgehog 64 decay step": (near, "hedgehog", BF16, 64, 1, True),
    **{f"near {n} 64 step": (near, n, BF16, 64, 1) for n in ("window", "hedgehog", "elu")},
}  # fmt: skip


def main(archs, *names):
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    seen = set()

    def instead(kernel, grid, like, *arguments, **constants):
        key = (
            kernel.fn,
            tuple(sorted(constants.items())),
            tuple(map(str, (getattr(a, "dtype", a) for a in arguments))),
        )
        if key not in seen:
            seen.add(key)
            for arch in map(int, archs.split(",")):
                print(json.dumps({"case": case, **compiled(kernel, arguments, dict(constants), arch)}), flush=True)

    gpu.launch = instead
    for case in names or CASES:
        function, *arguments = CASES[case]
        function(*arguments)


if __name__ == "__main__":
    print(*CASES, sep="\n") if sys.argv[1:] == ["--list"] else main(*sys.argv[1:])
