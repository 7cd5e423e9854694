"""The benchmarks at tiny sizes: every figure is there with its spread, or the reason why it is not."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from hf_attnswap import UsageError, attentions, swap
from hf_attnswap.attentions import Heads
from hf_attnswap.benchmark.attention import bench, random_inputs
from hf_attnswap.benchmark.generation import decode, filled_cache
from hf_attnswap.benchmark.measure import interleaved
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.masks import Mask
from hf_attnswap.statistics import Spread

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("attention", "model", "figures", "peers", "where_time_goes")


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark("attention")` is that script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.long
def test_attention(benchmark, tmp_path, capsys):
    given = "--length 16 --length 32 --memory_length 64 --rounds 3 --dtype float32 --attention elu".split()
    given += ["--attention", "relu_power:p=8", "--threads", "1", "--output_dir", str(tmp_path / "out")]
    report = benchmark("attention").main(given)
    assert json.loads((tmp_path / "out" / "attention.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert report["machine"]["threads"] == 1 and report["versions"]["torch"] == torch.__version__
    assert "--length 16" in report["command"]
    figures = {(r["attention"], r["work"], r["length"]): r for r in report["figures"]}
    names = {"SDPA", "eager", "elu", "relu_power:p=8", *report["peers"]}
    for name, work, length in itertools.product(names, ("forward", "forward + backward", "decode"), (16, 32)):
        if name.startswith("ONNX") and work == "forward + backward":
            assert (name, work, length) not in figures
            continue
        found = figures[name, work, length]
        assert found["skipped"] is None and found["seconds"]["runs"] == 3
        assert (found["ratio"] is None) == (name == "SDPA")
    assert figures["elu, bidirectional", "forward", 32]["control"] == "SDPA, bidirectional"
    crossed = {(c["attention"], c["work"]) for c in report["crossovers"]}
    assert crossed >= {("elu", "forward"), ("elu", "decode"), ("relu_power:p=8", "forward + backward")}
    assert {r["attention"] for r in report["memory"]} == {name for name in names if not name.startswith("ONNX")}
    assert all(r["peak_memory_mib"] > 0 or r["skipped"] for r in report["memory"])
    printed = capsys.readouterr()
    assert "times as fast as SDPA" in printed.out and "relu_power:p=8" in printed.out
    assert ("fast-transformers is left out" in printed.err) != ("fast-transformers" in report["peers"])


def test_attention_in_bfloat16(benchmark, monkeypatch, tmp_path):
    """The peer, which knows float32 alone, is named with that reason."""
    module = benchmark("attention")
    monkeypatch.setattr(module, "measure_memory", lambda *_: [])
    monkeypatch.setattr(module, "peers", lambda: {"fast-transformers": module.Sdpa(), "another": "is not there"})
    given = (
        "--length 16 --rounds 1 --dtype bfloat16 --attention softmax --attention relu --threads 1 --threads 2".split()
    )
    report = module.main([*given, "--output_dir", str(tmp_path / "out")])
    figures = report["figures"]
    assert {r["dtype"] for r in figures} == {"bfloat16"} and report["peers"] == ["fast-transformers"]
    assert {r["threads"] for r in figures} == {1, 2}
    assert all(bool(r["to_softmax"]) == (r["skipped"] is None and r["control"] == "SDPA") for r in figures)
    for record in figures:
        assert record["skipped"] == ("float32 only" if record["attention"] == "fast-transformers" else None)


def test_what_would_take_too_long_is_left_out_with_the_reason(benchmark):
    module = benchmark("attention")
    entry = module.Entry(None, "SDPA", 2)
    assert module.too_slow(entry, "forward", 200, (100, 1.0), budget=3) == "about 4 s a call"
    assert module.too_slow(entry, "forward", 200, (100, 1.0), budget=5) is None
    assert module.too_slow(module.Entry(None, None, 2), "forward", 200, (100, 1.0), budget=3) is None
    assert module.too_slow(module.Entry(None, "SDPA", 1), "forward", 200, (100, 1.0), budget=3) is None
    eager = module.Entry(module.Eager(), "SDPA", 2)
    assert "GiB" in module.unfit(eager, "forward", torch.float32, Heads(9, 3, 64), 2**18, 1)
    skipped = {"skipped": "about 4 s a call", "control": "SDPA", "seconds": None, "ratio": None}
    assert module.cell(skipped) == "[about 4 s a call]"


def test_refusals(benchmark, tmp_path):
    attention, model = benchmark("attention").main, benchmark("model").main
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="Did you mean 'hedgehog'"):
        attention([*out, "--attention", "hedghog"])
    with pytest.raises(UsageError, match="must be at least 1"):
        attention([*out, "--length", "0"])
    with pytest.raises(UsageError, match="float7"):
        attention([*out, "--dtype", "float7"])
    with pytest.raises(UsageError, match="must be at least 1"):
        model([*out, "--model_name_or_path", "any", "--rounds", "0"])
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        attention(["--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_peers_compute_what_they_are_named_for(benchmark):
    peers = benchmark("peers")
    heads = Heads(4, 2, 8)
    query, key, value = random_inputs(heads, 20)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(peers.Eager()(query, key, value), expected)
    torch.testing.assert_close(peers.Eager().step(query, key, value)(), expected[:, :, -1:])
    pytest.importorskip("fast_transformers", reason="pytorch-fast-transformers is not installed (extra bench-peer)")
    elu = attentions.get("elu")(heads)(query, key, value, Mask(20, 20), 1.0)
    peer = peers.FastTransformers()
    torch.testing.assert_close(peer(query, key, value), elu, rtol=1e-4, atol=1e-5)
    assert peer.step(query, key, value)().shape == (1, 4, 8)


@pytest.mark.long
def test_model(benchmark, checkpoint, tmp_path, capsys):
    given = "--length 16 --context_length 32 --new_tokens 2 --rounds 2 --dtype float32 --arm elu --arm window".split()
    given += ["--model_name_or_path", checkpoint, "--output_dir", str(tmp_path / "out")]
    report = benchmark("model").main(given)
    assert json.loads((tmp_path / "out" / "model.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "out" / "model.png").read_bytes().startswith(b"\x89PNG")
    figures = {(r["arm"], r["work"]): r for r in report["figures"]}
    assert set(figures) == {(a, w) for a in ("softmax", "elu", "window") for w in ("prefill", "decode")}
    for (arm, _), record in figures.items():
        assert record["tokens_per_s"]["runs"] == 2 and (record["ratio"] is None) == (arm == "softmax")
    assert figures["softmax", "decode"]["cache_mib"] > figures["softmax", "prefill"]["cache_mib"]
    assert figures["elu", "decode"]["cache_mib"] == figures["elu", "prefill"]["cache_mib"]
    assert "times softmax's" in capsys.readouterr().out


@pytest.mark.parametrize("name", (None, "elu", "hedgehog+window", "window", "relu_norm"))
def test_a_filled_cache_is_that_of_a_prompt(checkpoint, name):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    if name:
        swap(model, name)
    with torch.no_grad():
        read = model(torch.ones(1, 100, dtype=torch.long), use_cache=True).past_key_values
    filled = filled_cache(model, 100)
    assert filled.get_seq_length() == read.get_seq_length() == 100
    assert cache_nbytes(filled) == cache_nbytes(read)
    decode(model, filled, torch.ones(1, 1, dtype=torch.long), 3)
    assert filled.get_seq_length() == 103


def test_where_time_goes(benchmark, capsys):
    module = benchmark("where_time_goes")
    a, b = torch.randn(2, 256, 256)
    found = module.shares(lambda: torch.mm(a, b))
    assert found["products"] > 0.5 and sum(found.values()) == pytest.approx(1)
    for more in ([], ["--backward"], ["--decode"]):
        module.main(["--attention", "elu", "--length", "32", *more])
    assert capsys.readouterr().out.count("elu") == 3


def test_bench_of_the_command_line():
    heads = Heads(4, 2, 8)
    (row,) = bench({"elu": attentions.get("elu")(heads)}, heads, [16], rounds=2)
    assert (row.attention, row.length, row.forward.runs, row.forward_backward.runs) == ("elu", 16, 2, 2)
    assert len(row.forward_s) == len(row.sdpa_forward_s) == 2 and min(row.forward_s) > 0
    assert row.forward.low <= row.forward.median <= row.forward.high


def test_rounds_end_with_the_budget():
    clock = []
    times = interleaved({"a": lambda: clock.append(1)}, rounds=4)
    assert len(times["a"]) == 4 and len(clock) == 5  # the first is to warm up
    times = interleaved({"a": lambda: clock.append(1)}, rounds=4, budget_s=0)
    assert len(times["a"]) == 1 and len(clock) == 6


def test_quartiles():
    found = Spread.quartiles([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.median, found.low, found.high, found.runs) == (3, 2, 4, 5)
    assert Spread.quartiles([2.0]) == Spread(2.0, 2.0, 2.0, 1)
