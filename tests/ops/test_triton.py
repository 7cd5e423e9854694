"""The Triton forms on a machine without a GPU: chosen never, tested in the interpreter, compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_under_test import DEVICE

from hf_attnswap import attentions
from hf_attnswap.attentions import Heads
from hf_attnswap.masks import Mask
from hf_attnswap.ops import backends, gpu
from hf_attnswap.ops.scores import score_attention

HERE = Path(__file__).parent
FILES = [str(HERE / f"test_triton_{op}.py") for op in ("scores", "linear", "window", "gated_delta")]
needs_triton = pytest.mark.skipif(
    gpu.missing() is not None or DEVICE.type != "cpu" or gpu.INTERPRETED, reason=gpu.missing() or "runs as it is"
)
# Compiled by default; the shared memory of an A100 and of an H100.
FEW = ("scores relu_norm 64 forward", "linear elu 64 step", "gated delta 64 step")
SHARED = {80: 163 << 10, 90: 227 << 10}


def most_spilled(case):
    """The bytes that a thread may spill; wide heads and float32 fill the registers."""
    return 512 if "256" in case or "float32" in case else 160


def run(*command, **variables):
    """What a command writes, in a process of its own; its end where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *command], env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_kernels_in_the_interpreter():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.long
def test_more_in_the_interpreter():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "long", *FILES, TRITON_INTERPRET="1")


def compile_and_check(archs, *cases, tmp_path):
    lines = run(str(HERE.parent / "compiled_kernels.py"), archs, *cases, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    kernels = [json.loads(line) for line in lines if line.startswith("{")]
    assert kernels
    for kernel in kernels:
        assert kernel["spilled"] <= most_spilled(kernel["case"]), kernel
        assert kernel["shared"] <= SHARED[kernel["arch"]], kernel
    return kernels


@needs_triton
def test_some_kernels_compile_for_gpus(tmp_path):
    kernels = compile_and_check("90", *FEW, tmp_path=tmp_path)
    assert {k["kernel"] for k in kernels} == {"scores._forward.forward", "linear._step.step", "delta._step.step"}


@needs_triton
@pytest.mark.long
def test_all_kernels_compile_for_gpus(tmp_path):
    compile_and_check("80,90", tmp_path=tmp_path)


def arguments(mask=None):
    relu = attentions.get("relu")(Heads(2, 1, 16)).activation()
    return *(torch.zeros(1, h, 4, 16, device="cpu") for h in (2, 1, 1)), mask or Mask(4, 4), 1.0, relu


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter runs on the CPU")
def test_no_triton_form_is_chosen_on_a_cpu_and_a_forced_one_says_why():
    with backends.watch() as ran:
        score_attention(*arguments())
    assert "triton" not in ran["scores"]
    why = "triton is not installed" if gpu.missing() else "it runs on cuda, not on cpu"
    with backends.backend("triton"), pytest.raises(NotImplementedError, match=f"backend triton.* {why}"):
        score_attention(*arguments())


def test_an_old_gpu_is_said_once_and_passed_over(monkeypatch, caplog):
    """As on a GPU of capability 7.5: the next form, and the same numbers."""
    monkeypatch.setattr(gpu, "_capability", lambda index: (7, 5))
    query = torch.empty(1, 2, 4, 16, device="meta")

    class Old:
        """A tensor that says it is on a GPU."""

        device, shape, dtype = torch.device("cuda", 0), query.shape, query.dtype

    reason = gpu.unfit(Old, query, query)
    assert reason == "the kernels need compute capability 8.0, this GPU has 7.5"
    given = arguments()
    monkeypatch.setattr(backends.OPS["scores"].forms["triton"], "missing", None)
    monkeypatch.setattr(backends.OPS["scores"].forms["triton"], "devices", ("cpu",))
    monkeypatch.setattr(backends.OPS["scores"].forms["triton"], "unfit", lambda *arguments: reason)
    expected = score_attention(*given)
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level("INFO", logger=backends.__name__), backends.watch() as ran:
        form_first = dict(sorted(backends.OPS["scores"].forms.items(), key=lambda item: item[0] != "triton"))
        monkeypatch.setattr(backends.OPS["scores"], "forms", form_first)
        for _ in range(2):
            torch.testing.assert_close(score_attention(*given), expected)
    said = [r.getMessage() for r in caplog.records if "triton" in r.getMessage()]
    assert said == [f"scores: backend triton is passed over: {reason}"]
    assert "triton" not in ran["scores"]


TAKEN = ("scores", "window", "linear", "hybrid", "gated", "delta", "gated_delta")


@pytest.mark.parametrize("op", TAKEN)
def test_heads_that_no_kernel_takes_go_to_the_next_form(op, monkeypatch, caplog):
    """As on a GPU: one line at INFO, and the definition's numbers; where the form is forced, one error."""
    name = {"scores": "relu_norm", "linear": "elu", "hybrid": "elu+window"}.get(op, op)
    variant, generator = attentions.get(name)(Heads(2, 1, 264)), torch.Generator().manual_seed(0)
    given = [torch.randn(1, h, 5, 264, generator=generator, device="cpu") for h in (2, 1, 1)]
    forms = backends.OPS[op].forms
    monkeypatch.setattr(forms["triton"], "missing", None)
    monkeypatch.setattr(forms["triton"], "devices", ("cpu",))
    first = dict(sorted(forms.items(), key=lambda item: item[0] != "triton"))
    monkeypatch.setattr(backends.OPS[op], "forms", first)
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level("INFO", logger=backends.__name__), torch.no_grad():
        for _ in range(2):
            found = variant(*given, Mask(5, 5), 0.1)
        expected = variant.reference(*(t.double() for t in given), Mask(5, 5), 0.1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    why = "heads are 264 wide, the kernels take 256"
    assert [r.getMessage() for r in caplog.records] == [f"{op}: backend triton is passed over: {why}"]
    with backends.backend("triton"), pytest.raises(NotImplementedError) as error:
        variant(*given, Mask(5, 5), 0.1)
    says = f"{op}: HF_ATTNSWAP_BACKEND asks for backend triton, which cannot serve this call: {why}"
    assert str(error.value) == says


def test_the_package_is_imported_without_its_kernels():
    """All of them import `tiles`, and triton with it; torch may import triton by itself."""
    assert DEVICE.type != "cpu" or gpu.INTERPRETED or "hf_attnswap.ops.tiles" not in sys.modules
