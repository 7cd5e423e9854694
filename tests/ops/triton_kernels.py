"""What the tests of the Triton kernels share: they run on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1.

`test_triton.py` runs these files in the interpreter, in a process of their own: triton reads the variable when it is
imported, for good.
"""

import inspect

import pytest
import torch
from device_under_test import DEVICE

from hf_attnswap.ops import gpu

if gpu.missing() or DEVICE.type not in gpu.DEVICES:
    pytest.skip(gpu.missing() or "run by test_triton.py, in the interpreter", allow_module_level=True)

# Largest error allowed, as a part of the largest number.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def patch_once():
    """Keep the interpreter from patching triton's language again at each call within a kernel: twice as fast."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(function):
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)]
        done = all(not tl.core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if done else patch(function)

    interpreter._patch_lang = once


if gpu.INTERPRETED:
    patch_once()


def gradients(outputs, leaves, seed=1):
    """Gradients of the leaves for random gradients of the outputs, the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [o for o in outputs if o is not None and o.requires_grad]
    given = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(o) for o in outputs]
    return torch.autograd.grad(outputs, leaves, given, allow_unused=True)


def assert_near(ours, exact, dtype, factor=1.0):
    """Compare tensors, in pairs, with what float64 gives."""
    assert len(ours) == len(exact)
    for i, (x, y) in enumerate(zip(ours, exact, strict=True)):
        assert (x is None) == (y is None), i
        if x is None:
            continue
        assert x.shape == y.shape and x.isfinite().all(), i
        error = float((x.double() - y.double()).detach().abs().max() / y.detach().abs().max().clamp(min=1e-6))
        assert error < TOLERANCE[dtype] * factor, f"output {i}: {error}"
