"""The CPU kernels in programs: torch.compile takes every op whole, torch.export for any length, with its gradient."""

import pytest
import torch
import torch.nn.functional as F
from ops.kernels import needs_kernels

from hf_attnswap.attentions.elu import ELU
from hf_attnswap.ops import delta, gated, gated_delta, hybrid, linear, window
from hf_attnswap.ops.backends import backend

pytestmark = needs_kernels
MIX = torch.zeros(2)


def gates(query):
    """Numbers `[B, Hkv, T]` of the query, at most 0."""
    return F.logsigmoid(query[:, :1, :, 0])


CALLS = {
    "linear": lambda q, k, v: linear.causal_linear(q, k, v, ELU, ELU)[0],
    "gated": lambda q, k, v: gated.causal_gated(q.exp(), k.exp(), v, gates(q))[0],
    "delta": lambda q, k, v: delta.causal_delta(q / 4, k / 4, v, gates(q).exp())[0],
    "gated_delta": lambda q, k, v: gated_delta.causal_gated_delta(q / 4, k / 4, v, gates(q).exp(), gates(v))[0],
    "window": lambda q, k, v: window.window_attention(q, k, v, 0.3, window=8, sinks=2)[0],
    "hybrid": lambda q, k, v: hybrid.hybrid_attention(q, k, v, ELU, ELU, MIX, 0.3, window=8, sinks=2)[0],
}
KERNELS = {"gated": ["linear"], "gated_delta": ["delta"], "hybrid": ["window", "linear"]}


def inputs(length: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, h, length, 16, dtype=dtype, requires_grad=True) for h in (2, 1, 1)]


def calls_kernels(code: str, op: str) -> bool:
    return all(f"hf_attnswap.{kernel}" in code for kernel in KERNELS.get(op, [op]))


@pytest.mark.parametrize("op", CALLS)
def test_compile_takes_the_kernels_whole(op):
    codes = []

    def look(graph, _):
        codes.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled, given = torch.compile(CALLS[op], backend=look, fullgraph=True), inputs(20)
    found = [[out, *torch.autograd.grad(out.square().sum(), given)] for out in (compiled(*given), CALLS[op](*given))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(codes) == 1 and calls_kernels(codes[0], op)


@pytest.mark.long
@pytest.mark.parametrize("op", CALLS)
def test_compile_makes_one_graph_of_the_gradient(op):
    """As torch.compile does it for training: forward and backward pass are both programs."""
    torch._dynamo.reset()
    compiled, given = torch.compile(CALLS[op], backend="aot_eager", fullgraph=True), inputs(20)
    found = [[out, *torch.autograd.grad(out.square().sum(), given)] for out in (compiled(*given), CALLS[op](*given))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["hybrid", *(pytest.param(o, marks=pytest.mark.long) for o in CALLS if o != "hybrid")])
def test_export_for_any_length(op):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return CALLS[op](q, k, v)

    dims = dict.fromkeys("qkv", {2: torch.export.Dim.DYNAMIC})
    with torch.no_grad():
        program = torch.export.export(Layer(), tuple(inputs(12)), dynamic_shapes=dims, strict=False)
        assert calls_kernels(program.graph_module.code, op)
        for length in (2, 12, 70):
            with backend("torch"):
                expected = CALLS[op](*inputs(length))
            torch.testing.assert_close(program.module()(*inputs(length)), expected, rtol=1e-4, atol=1e-5)


def test_compile_takes_steps_of_generation_whole():
    """One program for all of them, from a window that is not full to one that is."""
    given, codes = [t.detach() for t in inputs(30)], []

    def look(graph, _):
        codes.append(graph.code)
        return graph.forward

    def windows(q, k, v, state):
        return window.window_attention(q, k, v, 0.3, window=8, sinks=2, state=state, keep_state=True)

    def hybrids(q, k, v, state):
        return hybrid.hybrid_attention(q, k, v, ELU, ELU, MIX, 0.3, window=8, sinks=2, state=state, keep_state=True)

    for call, kernels in ((windows, ["window_step"]), (hybrids, ["window_step", "linear"])):
        torch._dynamo.reset()
        codes.clear()
        with torch.no_grad():
            whole, _ = call(*given, None)
            _, state = call(*(t[:, :, :5] for t in given), None)
            compiled = torch.compile(call, backend=look, fullgraph=True)
            for i in range(5, 30):
                out, state = compiled(*(t[:, :, i : i + 1] for t in given), state)
                torch.testing.assert_close(out, whole[:, :, i : i + 1], rtol=1e-4, atol=1e-5)
        assert len(codes) <= 2 and all(f"hf_attnswap.{kernel}" in code for code in codes for kernel in kernels)
