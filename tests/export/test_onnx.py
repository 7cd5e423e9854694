"""What `attnswap export` writes, run by onnxruntime against torch.

torch takes long to make a graph. So most tests run the program that the graph is made of in torch, each node of it by
onnxruntime; those that write the graph itself are long.
"""

import pytest
import torch
from attention_cases import NAMES, small_options
from device_under_test import DEVICE
from tiny_models import randomise, tiny, tiny_encoder, tokens
from transformers import BartConfig, BartForConditionalGeneration

import hf_attnswap
from hf_attnswap import attentions
from hf_attnswap.attentions import groups
from hf_attnswap.errors import UsageError
from hf_attnswap.ops.backends import backend
from hf_attnswap.ops.nodes import making_graph
from hf_attnswap.ops.window import window_attention

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'hf_attnswap[onnx]')")
if torch.device(DEVICE).type != "cpu":
    pytest.skip("an export is made on the CPU", allow_module_level=True)

from onnx_runs import Graph, run_node  # noqa: E402

from hf_attnswap.export.onnx import FILE, export  # noqa: E402
from hf_attnswap.export.program import Program  # noqa: E402

SMALL = {"window": 16, "sinks": 2}
CAUSAL = [name for name in NAMES if "causal" in attentions.get(name).kinds]
PLANS = {
    "layers and groups": {
        0: "elu", 1: {"attention": "hedgehog+window", **SMALL}, "2.0": {"attention": "window", **SMALL},
    },
    "some layers": {1: {"attention": "window", **SMALL}},
    "half-lives": {
        0: {"attention": "elu", "half_life": 8.0}, 1: {"attention": "hedgehog+window", "half_life": 8.0, **SMALL},
    },
    "no rotation": {
        0: {"attention": "elu", "unrotate": True}, 1: {"attention": "hedgehog+window", "unrotate": True, **SMALL},
    },
}  # fmt: skip


def planned(name: str):
    return randomise(hf_attnswap.swap(tiny(), layers=PLANS[name]))


def one_layer(name: str):
    model = tiny()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return randomise(hf_attnswap.swap(model, name, **small_options(name)))


class InTorch:
    """Run a program as `Graph` runs a graph."""

    def __init__(self, model, monkeypatch):
        self.program = Program(model)
        monkeypatch.setattr(torch.onnx.ops, "symbolic_multi_out", run_node)
        # As in a program: keys that are kept have no memory to spare.
        monkeypatch.setattr(groups, "values_are_hidden", lambda: True)

    def empty(self, batch):
        return {t.name: t.empty(batch) for t in self.program.remembered}

    def reads(self, ids, mask, past):
        with making_graph():
            outputs, present = self.program(ids, mask, list(past.values()))
        return dict(zip(self.program.outputs, outputs, strict=True)), dict(zip(past, present, strict=True))


@torch.no_grad()
def agrees(model, run, cases=((1, 5), (3, 64), (2, 70), (2, 150), (1, 1)), more=(1, 2)):
    """Texts, padded on the left, then one token and two at once: the logits are those of torch for whole texts."""
    for batch, length in cases:
        ids = tokens(length + sum(more), batch)
        mask = torch.ones_like(ids)
        mask[1:, : length // 3] = 0
        position = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        past, start = run.empty(batch), 0
        for new in (length, *more):
            part = slice(start, start + new)
            found, past = run.reads(ids[:, part], mask[:, part], past)
            seen = mask[:, part].bool()
            logits = torch.as_tensor(found["logits"])[seen]
            torch.testing.assert_close(logits, expected[:, part][seen], rtol=1e-4, atol=1e-4)
            start += new


@torch.no_grad()
def encoder_agrees(model, run):
    for batch, length in ((1, 1), (3, 64), (2, 130)):
        ids, mask = tokens(length, batch), torch.ones(batch, length, dtype=torch.long)
        mask[1:, length // 2 :] = 0
        found, past = run.reads(ids, mask, run.empty(batch))
        assert past == {}
        expected, seen = model(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()
        hidden = torch.as_tensor(found["last_hidden_state"])
        torch.testing.assert_close(hidden[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "sinks"), ((16, 4), (1, 0), (3, 7)))
def test_window_attention_by_nodes(window, sinks, monkeypatch):
    monkeypatch.setattr(torch.onnx.ops, "symbolic_multi_out", run_node)
    fixed = dict(window=window, sinks=sinks)
    for batch, length in ((1, 1), (2, 5), (2, 64), (3, 200)):
        torch.manual_seed(length)
        q, k, v = (torch.randn(batch, heads, length + 3, dim) for heads, dim in ((6, 8), (3, 8), (3, 5)))
        valid = torch.ones(batch, length + 3, dtype=torch.bool)
        valid[1:, : length // 2] = False
        expected, _ = window_attention(*(t.double() for t in (q, k, v)), 0.3, valid=valid, **fixed)
        state, outs = None, []
        for part in (slice(0, length), slice(length, length + 2), slice(length + 2, length + 3)):
            new = (t[:, :, part] for t in (q, k, v))
            with making_graph():
                out, state = window_attention(
                    *new, 0.3, valid=valid[:, part], state=state, keep_state=True, **fixed
                )  # fmt: skip
            outs.append(out)
        seen = valid[:, None].expand(-1, 6, -1)
        torch.testing.assert_close(torch.cat(outs, 2)[seen], expected.float()[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_program_of_a_plan(plan, monkeypatch):
    model = planned(plan)
    agrees(model, InTorch(model, monkeypatch))


@pytest.mark.parametrize("name", CAUSAL)
def test_program_of_each_variant(name, monkeypatch):
    model = one_layer(name)
    agrees(model, InTorch(model, monkeypatch), cases=((2, 70), (1, 1)))


def test_program_of_an_encoder(monkeypatch):
    model = randomise(hf_attnswap.swap(tiny_encoder(), "elu"))
    encoder_agrees(model, InTorch(model, monkeypatch))


def test_what_is_remembered():
    model = planned("layers and groups")
    remembered = {tensor.name: tensor.shape for tensor in Program(model).remembered}
    assert list(remembered)[:4] == ["position", "mask", "0.S", "1.key"]
    assert remembered["0.S"] == ("batch", 2, 8, 9) and remembered["1.key"] == ("batch", 2, 18, 8)
    assert remembered["2.1.key"] == ("batch", 1, "past", 8)
    assert "mask" not in [tensor.name for tensor in Program(one_layer("elu")).remembered]


@pytest.mark.long
@pytest.mark.parametrize("plan", PLANS)
def test_graph_of_a_plan(plan, tmp_path):
    model = planned(plan)
    export(model, tmp_path)
    agrees(model, Graph(str(tmp_path / FILE)))


@pytest.mark.long
@pytest.mark.parametrize("name", CAUSAL)
def test_graph_of_each_variant(name, tmp_path):
    model = one_layer(name)
    export(model, tmp_path)
    agrees(model, Graph(str(tmp_path / FILE)), cases=((2, 70), (1, 1)))


def test_graph_of_an_encoder_of_one_layer(tmp_path):
    model = tiny_encoder()
    del model.encoder.layer[1:]
    model.config.num_hidden_layers = 1
    randomise(hf_attnswap.swap(model, "elu"))
    export(model, tmp_path)
    encoder_agrees(model, Graph(str(tmp_path / FILE)))


@pytest.mark.long
@pytest.mark.parametrize("name", ("elu", "relu_norm", "softmax"))
def test_graph_of_an_encoder(name, tmp_path):
    model = randomise(hf_attnswap.swap(tiny_encoder(), name))
    export(model, tmp_path)
    encoder_agrees(model, Graph(str(tmp_path / FILE)))


def test_what_cannot_be_exported(tmp_path):
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    bart = BartConfig(vocab_size=64, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, **sizes)
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        export(hf_attnswap.swap(BartForConditionalGeneration(bart), "relu"), tmp_path)
    with pytest.raises(UsageError, match="sees the last 8 tokens alone"):
        export(hf_attnswap.swap(tiny("mistral", sliding_window=8), "elu"), tmp_path)


def test_forms_of_graphs_compute_nothing_elsewhere():
    x = torch.rand(1, 2, 3, 4)
    with backend("window=onnx"), pytest.raises(NotImplementedError, match="no graph of ONNX is made"):
        window_attention(x, x, x, 0.3, window=2, sinks=0)
