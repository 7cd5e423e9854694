"""The attention alone, timed: what the control is, ratios and scaling by hand, and the command."""

import json
import sys

import pytest
import torch
from tiny_models import tiny

from hf_attnswap import cli
from hf_attnswap.attentions import Heads
from hf_attnswap.benchmark.attention import Row, random_inputs, scaling, sdpa_kernel
from hf_attnswap.benchmark.measure import peak_memory_mib, ratios, speedup
from hf_attnswap.statistics import Spread


def test_the_control_is_the_fused_kernel_and_not_softmax_written_out():
    """With shared keys and values too, which some kernels of torch do not take."""
    for heads in (Heads(4, 4, 16), Heads(9, 3, 64)):
        assert sdpa_kernel(random_inputs(heads, 64)) == "_scaled_dot_product_flash_attention_for_cpu"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert sdpa_kernel(random_inputs(Heads(4, 2, 16), 64)) == "math"


def test_ratios_are_of_the_same_round():
    assert ratios([2.0, 6.0, 3.0], [1.0, 2.0, 6.0]) == [2.0, 3.0, 0.5]
    found = speedup([2.0, 6.0, 3.0], [1.0, 2.0, 6.0])
    assert (found.median, found.low, found.high, found.runs) == (2.0, 0.5, 3.0, 3)
    middle = Spread.quartiles([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (middle.median, middle.low, middle.high) == (3.0, 2.0, 4.0)
    assert vars(Spread.quartiles([7.0])) == vars(Spread(7.0, 7.0, 7.0, 1))


def test_peak_memory_is_what_a_call_needs_at_its_highest():
    def run():
        x = torch.ones(32 * 2**20 // 4)
        return (x + 1).sum()

    found = peak_memory_mib(run)
    if found is None:
        pytest.skip("this system does not tell")
    assert 60 < found < 80  # two tensors of 32 MiB


def row(name, length, seconds, sdpa):
    made = Spread.of([sdpa / seconds])
    return Row(name, length, made, made, (seconds,) * 3, (sdpa,) * 3, None, None)


def test_scaling_by_hand():
    """SDPA n^2, ours n: as fast at 400 tokens, four times as slow at 100."""
    lengths = [100, 200, 400, 800]
    rows = [row("ours", n, 4e-4 * n, 1e-6 * n * n) for n in reversed(lengths)]
    rows += [row("slow", n, 2e-6 * n * n, 1e-6 * n * n) for n in lengths]
    sdpa, ours, slow = scaling(rows)
    assert (sdpa.attention, sdpa.faster_from) == ("sdpa", None) and sdpa.growth.exponent == pytest.approx(2)
    assert ours.growth.exponent == pytest.approx(1) and ours.faster_from == pytest.approx(400)
    assert slow.growth.exponent == pytest.approx(2) and slow.faster_from is None
    assert scaling(rows[:1])[1].growth is None


def test_the_command_says_all_of_it(tmp_path, monkeypatch, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    command = f"attnswap bench {tmp_path} --attention elu --length 16 --length 64 --rounds 1".split()

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out

    found = json.loads(run("--json"))
    assert found["sdpa"] == "_scaled_dot_product_flash_attention_for_cpu" and len(found["rows"]) == 2
    assert [entry["attention"] for entry in found["scaling"]] == ["sdpa", "elu"]
    assert all(entry["growth"] is None for entry in found["scaling"])  # two times are too few
    assert all(len(entry["forward_s"]) == 1 for entry in found["rows"])
    monkeypatch.setenv("COLUMNS", "160")
    printed = run()
    assert "flash_attention" in printed and "n to the power of (95 %)" in printed and "elu" in printed
