"""What `attnswap export` writes, run by onnxruntime against torch."""

import pytest
import torch
from attention_cases import NAMES, small_options
from device_under_test import DEVICE
from tiny_models import randomise, tiny, tiny_encoder, tokens
from transformers import BartConfig, BartForConditionalGeneration

import hf_attnswap
from hf_attnswap import attentions
from hf_attnswap.errors import UsageError
from hf_attnswap.ops.nodes import making_graph
from hf_attnswap.ops.window import window_attention

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'hf_attnswap[onnx]')")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'hf_attnswap[onnx]')")
if torch.device(DEVICE).type != "cpu":
    pytest.skip("an export is made on the CPU", allow_module_level=True)

from onnx import TensorProto, helper  # noqa: E402
from onnx_runs import Graph  # noqa: E402

from hf_attnswap.export.onnx import FILE, export  # noqa: E402

SMALL = {"window": 16, "sinks": 2}


def agrees(model, folder, cases=((1, 5), (3, 64), (2, 70), (2, 150), (1, 1)), more=(1, 2)):
    """Texts, padded on the left, then tokens one by one and two at once: logits as torch has them for whole texts."""
    graph = Graph(str(folder / FILE))
    for batch, length in cases:
        ids = tokens(length + sum(more), batch)
        mask = torch.ones_like(ids)
        mask[1:, : length // 3] = 0
        with torch.no_grad():
            position = (mask.cumsum(1) - 1).clamp(min=0)
            expected = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        past, start = graph.empty(batch), 0
        for new in (length, *more):
            part = slice(start, start + new)
            found, past = graph.reads(ids[:, part], mask[:, part], past)
            seen = mask[:, part].bool()
            torch.testing.assert_close(
                torch.from_numpy(found["logits"])[seen], expected[:, part][seen], rtol=1e-4, atol=1e-4
            )
            start += new


@pytest.mark.parametrize(("window", "sinks"), ((16, 4), (1, 0), (3, 7)))
def test_the_function_is_window_attention(window, sinks):
    from hf_attnswap.export.functions import BandedSoftmax

    given = "q k v valid old_key old_value count".split()
    kinds = [TensorProto.FLOAT] * 3 + [TensorProto.BOOL] + [TensorProto.FLOAT] * 2 + [TensorProto.INT64]
    ranks, found = (5, 4, 4, 2, 4, 4, 1), "numerator denominator maximum past.key past.value".split()
    fixed = dict(domain="hf_attnswap", window=window, sinks=sinks, scaling=0.3)
    described = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("BandedSoftmax", given, found, **fixed)], "graph",
        [described(name, kind, [None] * rank) for name, kind, rank in zip(given, kinds, ranks, strict=True)],
        [described(name, TensorProto.FLOAT, None) for name in found],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("hf_attnswap", 1)]
    functions = [BandedSoftmax.to_function_proto()]
    model = helper.make_model(graph, functions=functions, opset_imports=sets, ir_version=10)
    session = Graph(model.SerializeToString()).session
    for batch, length in ((1, 1), (2, 5), (2, 64), (3, 200)):
        torch.manual_seed(length)
        q, k, v = (torch.randn(batch, heads, length + 3, dim) for heads, dim in ((6, 8), (3, 8), (3, 5)))
        valid = torch.ones(batch, length + 3, dtype=torch.bool)
        valid[1:, : length // 2] = False
        double = (t.double() for t in (q, k, v))
        expected, _ = window_attention(*double, 0.3, window=window, sinks=sinks, valid=valid)
        slots, count = (batch, 3, sinks + window), torch.zeros(batch, dtype=torch.long)
        state, outs = [torch.zeros(*slots, 8).numpy(), torch.zeros(*slots, 5).numpy()], []
        for part in (slice(0, length), slice(length, length + 2), slice(length + 2, length + 3)):
            new = q[:, :, part].unflatten(1, (3, 2)), k[:, :, part], v[:, :, part], valid[:, part]
            feed = [*(t.numpy() for t in new), *state, count.numpy()]
            numerator, denominator, _, *state = session.run(None, dict(zip(given, feed, strict=True)))
            outs.append(torch.from_numpy(numerator / denominator).flatten(1, 2))
            count = count + valid[:, part].sum(1)
        seen = valid[:, None].expand(-1, 6, -1)
        torch.testing.assert_close(torch.cat(outs, 2)[seen], expected.float()[seen], rtol=1e-5, atol=1e-5)


def test_a_decoder_whose_layers_and_groups_differ(tmp_path):
    plan = {0: "elu", 1: {"attention": "hedgehog+window", **SMALL}, "2.0": {"attention": "window", **SMALL}}
    model = randomise(hf_attnswap.swap(tiny(), layers=plan))
    program = export(model, tmp_path)
    assert [tensor.name for tensor in program.remembered][:4] == ["position", "mask", "0.S", "1.key"]
    agrees(model, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_with_each_variant(name, tmp_path):
    if "causal" not in attentions.get(name).kinds:
        pytest.skip(f"{name} is not for decoders")
    model = tiny()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model = randomise(hf_attnswap.swap(model, name, **small_options(name)))
    export(model, tmp_path)
    agrees(model, tmp_path, cases=((2, 70), (1, 1)))


@pytest.mark.long
@pytest.mark.parametrize("name", ("elu", "relu_norm", "softmax"))
def test_an_encoder(name, tmp_path):
    model = randomise(hf_attnswap.swap(tiny_encoder(), name))
    export(model, tmp_path)
    graph = Graph(str(tmp_path / FILE))
    for batch, length in ((1, 1), (3, 64), (2, 130)):
        ids, mask = tokens(length, batch), torch.ones(batch, length, dtype=torch.long)
        mask[1:, length // 2 :] = 0
        found, past = graph.reads(ids, mask, graph.empty(batch))
        assert past == {}
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        seen = mask.bool()
        torch.testing.assert_close(
            torch.from_numpy(found["last_hidden_state"])[seen], expected[seen], rtol=1e-4, atol=1e-4
        )


def test_what_cannot_be_exported(tmp_path):
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    bart = BartConfig(vocab_size=64, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, **sizes)
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        export(hf_attnswap.swap(BartForConditionalGeneration(bart), "relu"), tmp_path)
    with pytest.raises(UsageError, match="sees the last 8 tokens alone"):
        export(hf_attnswap.swap(tiny("mistral", sliding_window=8), "elu"), tmp_path)


def test_forms_of_graphs_compute_nothing_elsewhere():
    from hf_attnswap.ops.backends import backend

    x = torch.rand(1, 2, 3, 4)
    with backend("window=onnx"), pytest.raises(NotImplementedError, match="no graph of ONNX is made"):
        window_attention(x, x, x, 0.3, window=2, sinks=0)
    with making_graph():
        out, _ = window_attention(x, x, x, 0.3, window=2, sinks=0)
    assert out.shape == x.shape
