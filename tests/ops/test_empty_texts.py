"""Texts without tokens: every form of every op gives no rows, and leaves a state as it is."""

import pytest
import torch

from hf_attnswap.attentions import Heads
from hf_attnswap.attentions.elu import ELU
from hf_attnswap.attentions.relu import Relu
from hf_attnswap.masks import Mask
from hf_attnswap.ops import delta, gated, gated_delta, hybrid, linear, scores, softmax, window
from hf_attnswap.ops.backends import OPS

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 6


def call(op: str, state):
    """The op on no tokens: its output, and its state if it has one."""
    q, k, v = (
        torch.zeros(2, h, 0, d, requires_grad=True) for h, d in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, WIDTH))
    )
    gate = torch.zeros(2, KV_HEADS, 0)
    if op == "linear":
        out, _, state = linear.causal_linear(q, k, v, ELU, ELU, state=state, log_decay=-torch.rand(KV_HEADS) / 2)
    elif op == "gated":
        out, _, state = gated.causal_gated(q, k, v, gate, state=state)
    elif op == "delta":
        out, state = delta.causal_delta(q, k, v, gate, state=state)
    elif op == "gated_delta":
        out, state = gated_delta.causal_gated_delta(q, k, v, gate, gate, state=state)
    elif op == "window":
        out, state = window.window_attention(q, k, v, 0.3, window=4, sinks=2)
    elif op == "softmax":
        out = softmax.softmax_attention(q, k, v, Mask(0, 0), 0.3)
    elif op == "hybrid":
        out, state = hybrid.hybrid_attention(q, k, v, ELU, ELU, torch.zeros(HEADS), 0.3, window=4, sinks=2)
    else:
        activation = Relu(Heads(HEADS, KV_HEADS, DIM)).activation()
        out = scores.score_attention(q, k, v, Mask(0, 0), 0.3, activation)
    return out, state


CASES = [
    pytest.param(op, name, keeps, id=f"{op}-{name}{'-state' if keeps else ''}")
    for op in sorted(OPS)
    for name, form in OPS[op].forms.items()
    if name != "onnx"
    for keeps in ((False, True) if op in ("linear", "gated", "delta", "gated_delta") else (False,))
    if form.missing is None and "cpu" in (form.devices or ("cpu",)) and (op, name) != ("softmax", "cpu")  # too few
]


@pytest.mark.parametrize(("op", "name", "keeps"), CASES)
def test_a_text_without_tokens(monkeypatch, op, name, keeps):
    monkeypatch.setattr(OPS[op], "forms", {name: OPS[op].forms[name]})
    columns = WIDTH + (op in ("linear", "gated"))
    state = torch.rand(2, KV_HEADS, DIM, columns) if keeps else None
    out, after = call(op, state)
    assert out.shape == (2, HEADS, 0, WIDTH)
    if op in ("linear", "gated", "delta", "gated_delta"):
        torch.testing.assert_close(after, torch.zeros(2, KV_HEADS, DIM, columns) if state is None else state)
    if out.requires_grad:
        out.sum().backward()
