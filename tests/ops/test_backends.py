"""The choice of an implementation: every form of an op gives the same, and nothing is passed over in silence."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import NAMES, SCALING, build, inputs

from hf_attnswap.masks import Mask
from hf_attnswap.ops import backends
from hf_attnswap.ops.backends import Op, backend, watch

SWAPPED = [name for name in NAMES if name not in ("softmax", "none")]  # these are one call of torch


@pytest.mark.parametrize("name", SWAPPED)
def test_the_reference_backend_gives_what_torch_gives(name):
    variant = build(name, heads=4)
    results, ran = {}, {}
    for chosen in ("torch", "reference"):
        tensors = [t.requires_grad_() for t in inputs(70, heads=4)]
        with backend(chosen), watch() as ran[chosen]:
            out = variant(*tensors, Mask(70, 70), SCALING)
            out.square().sum().backward()
        results[chosen] = [out, *(t.grad for t in tensors)]
    for fast, reference in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-8, rtol=1e-6)
    for chosen in ran:
        assert {b for of_op in ran[chosen].values() for b in of_op} == {chosen}


@pytest.mark.parametrize("name", ("elu", "gated", "delta"))
def test_the_reference_backend_keeps_a_state(name):
    variant = build(name)
    tensors = inputs(9)
    whole = variant(*tensors, Mask(9, 9), SCALING)
    with backend("reference"), torch.no_grad():
        state = {}
        first = variant(*(t[:, :, :5] for t in tensors), Mask(5, 5), SCALING, state)
        rest = variant(*(t[:, :, 5:] for t in tensors), Mask(4, 9), SCALING, state)
    torch.testing.assert_close(torch.cat([first, rest], dim=2), whole)


def test_a_form_that_cannot_serve_is_passed_over_with_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    for _ in range(2):
        with backend("reference"), watch() as ran, torch.no_grad():
            build("window")(*inputs(9), Mask(9, 9), SCALING, {})
    assert ran == {"window": {"torch"}}
    assert caplog.messages == ["window: backend reference is passed over: the definition keeps no state for generation"]


def test_an_op_without_a_form_that_serves_says_so():
    op = Op("test_op")
    del backends.OPS["test_op"]
    op.form("torch", lambda x: "x is odd" if x % 2 else None)(lambda x: x)
    assert op(2) == 2
    with pytest.raises(NotImplementedError, match="test_op: no backend of torch, reference can serve this call"):
        op(1)
    with pytest.raises(ValueError, match="test_op: backend 'fpga' is not one of torch, reference"):
        op.form("fpga")


def test_the_variable_is_read_on_import():
    run = subprocess.run(
        [sys.executable, "-c", "from hf_attnswap.ops import backends; print(backends.order())"],
        env={**os.environ, backends.VARIABLE: "reference"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "('reference', 'torch')", run.stderr


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="HF_ATTNSWAP_BACKEND is 'fast'; expected one of torch, reference"):
        backends._ordered("fast")
