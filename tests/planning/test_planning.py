"""Planning from end to end on tiny models: what is written, going on after a kill, and what is refused."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from encoders import bert, sentences, words_tokenizer
from tiny_models import tiny
from transformers import BartConfig, BartForConditionalGeneration, BertForMaskedLM, BertModel

import hf_attnswap
from hf_attnswap import UsageError, read_plan, swap
from hf_attnswap.integration.swapping import softmax_groups, swapped_modules
from hf_attnswap.sources.lock import alone_in

pytest_plugins = ("training_fixtures",)
SHORT = dict(context_length=32, steps=4, texts=8, window=4, sinks=1)


def planned(model, tokenizer, text, budget="groups=1/2", output_dir=None, **changes):
    return hf_attnswap.plan(model, tokenizer, text, budget, output_dir=output_dir, **SHORT | changes)


def test_a_plan_is_found_verified_and_written(letters, text, tmp_path):
    model = tiny("llama")
    seen = []
    outcome = planned(
        model, letters, text, output_dir=tmp_path / "out", observe=lambda p: seen.append(p.done / p.total)
    )
    assert not swapped_modules(model)
    assert seen == sorted(seen) and seen[-1] <= 1
    plan, *others = outcome.arms
    assert len(plan.kept) == 3 and outcome.total == 6
    rivals = [arm for arm in others if len(arm.kept) == 3]
    assert {arm.name.rstrip(" 01234") for arm in rivals} == {
        "best by gate gradient", "best layers", "every n-th layer", "random groups"
    }  # fmt: skip
    assert sum(arm.name.startswith("random") for arm in rivals) == 5
    assert all(arm.over_plan["low"] is not None for arm in rivals)
    assert outcome.arms[-1].kept == () and outcome.arms[-1].cache < plan.cache < 1
    read = read_plan(tmp_path / "out" / "plan.yaml")
    read.require(model)
    swap(model, read.swap)
    assert softmax_groups(model) == (3, 6)
    table = json.loads((tmp_path / "out" / "pareto.json").read_text())
    assert [arm["name"] for arm in table["arms"]] == [arm.name for arm in outcome.arms]
    assert (tmp_path / "out" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "pareto.svg").is_file()


def test_every_kind_of_budget_is_met_or_says_by_how_much_not(letters, text):
    model = tiny("llama")
    cache = planned(model, letters, text, "cache<=0.7 at 256")
    assert cache.bounds[0].met and cache.plan.cache <= 0.7 and cache.cache_length == 256
    loose = planned(model, letters, text, "ppl<=30")
    assert loose.bounds[0].met and len(loose.plan.kept) == 1
    both = planned(model, letters, text, ["groups=1", "ppl<=1"])
    assert len(both.plan.kept) == 1 and both.bounds[1].met == (both.plan.damage["value"] <= 1)
    fast = planned(model, letters, text, "prefill>=1000 at 64")
    assert len(fast.plan.kept) == 1 and "which misses 'prefill>=1000 at 64' by" in fast.bounds[0].miss
    assert any("No plan meets the budget" in line for line in fast.lines())


def test_a_planning_that_was_stopped_goes_on_and_finds_the_same(letters, text, tmp_path, monkeypatch):
    model = tiny("llama")
    whole = planned(model, letters, text, output_dir=tmp_path / "whole", steps=10)

    class Stopped(Exception):
        pass

    for number, line in enumerate(("gradient 10", "measuring plan")):

        def stop(progress, line=line):
            if progress.line.startswith(line):
                raise Stopped

        with pytest.raises(Stopped):
            planned(model, letters, text, output_dir=tmp_path / "cut", steps=10, observe=stop)
        assert not swapped_modules(model), number
        assert not (tmp_path / "cut" / "plan.yaml").exists()
    seen = []
    cut = planned(model, letters, text, output_dir=tmp_path / "cut", steps=10, observe=lambda p: seen.append(p.line))
    assert not any(line.startswith("gradient") for line in seen)
    assert cut == whole
    assert (tmp_path / "cut" / "pareto.json").read_bytes() == (tmp_path / "whole" / "pareto.json").read_bytes()


@pytest.mark.long
def test_a_killed_command_goes_on(checkpoint, text, tmp_path):
    command = [
        sys.executable, "-m", "hf_attnswap", "plan", checkpoint, "--train_file", text, "--budget", "groups=1/2",
        "--context_length", "32", "--steps", "200", "--option", "window=4", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    kept = tmp_path / "out" / "measured" / "search.json"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (kept.exists() and json.loads(kept.read_text())["step"] > 3):
            pass
        process.send_signal(signal.SIGKILL)
    steps = json.loads(kept.read_text())["step"]
    assert 3 < steps < 200
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "The plan keeps" in done.stdout
    assert json.loads(kept.read_text())["step"] == 200


def test_a_folder_of_another_planning_is_refused(letters, text, tmp_path):
    planned(tiny("llama"), letters, text, output_dir=tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds a plan with context_length = 32, not 24"):
        planned(tiny("llama"), letters, text, output_dir=tmp_path / "out", context_length=24)
    with pytest.raises(UsageError, match="holds a plan with model"):
        planned(tiny("qwen2"), letters, text, output_dir=tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no earlier plan"):
        planned(tiny("llama"), letters, text, output_dir=tmp_path / "other")


def test_a_folder_in_which_another_planning_runs(letters, text, tmp_path):
    with alone_in(tmp_path / "out"), pytest.raises(UsageError, match="is in use by process"):
        planned(tiny("llama"), letters, text, output_dir=tmp_path / "out")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(sentences(400))
    return str(path)


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertModel])
def test_encoders_have_plans(cls, words):
    model = bert(cls)
    outcome = hf_attnswap.plan(
        model, words_tokenizer(), words, "groups=1/4", attention="relu", context_length=32, steps=4
    )
    assert len(outcome.plan.kept) == 2 and outcome.total == 8
    assert outcome.ratios == (cls is BertForMaskedLM)
    assert outcome.cache_length is None
    assert all(arm.damage["value"] >= 0 for arm in outcome.arms)
    swap(model, outcome.config)
    assert softmax_groups(model) == (2, 8)


@pytest.mark.parametrize(("kind", "groups"), [("cross", 8), ("causal", 8), ("bidirectional", 8)])
def test_encoder_decoders_have_plans_of_each_kind(kind, groups, letters, text):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
    layers = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
    model = BartForConditionalGeneration(BartConfig(**sizes, **layers, **ends)).eval()
    outcome = hf_attnswap.plan(
        model, letters, text, "groups=1/4", kinds=kind, attention="elu", context_length=32, steps=4
    )
    assert outcome.total == groups and len(outcome.plan.kept) == 2
    assert outcome.ratios and outcome.softmax_copy is not None
    swap(model, outcome.config)
    assert {attention.kind for attention in swapped_modules(model).values()} == {kind}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(context_length=512), "are needed: give more text"),
        (dict(texts=1000), "to verify on"),
        (dict(budget="warmth<=3"), "budget is 'warmth<=3'"),
        (dict(budget="groups=6"), "expected 1 to 5"),
        (dict(attention="windows"), "Unknown attention 'windows'"),
        (dict(window=0), "window"),
        (dict(steps=0), "steps is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(changes, says, letters, text, tmp_path):
    seen = []
    with pytest.raises(UsageError, match=says) as refused:
        planned(tiny("llama"), letters, text, output_dir=tmp_path / "out", observe=seen.append, **changes)
    assert "\n" not in str(refused.value)
    assert not seen and not (tmp_path / "out" / "measured").exists()


def test_lengths_beyond_the_model_are_refused(letters, text):
    with pytest.raises(UsageError, match="'cache<=0.5 at 1024' takes 1024 tokens"):
        planned(tiny("gpt2"), letters, text, "cache<=0.5 at 1024")


def test_the_command_plans(attnswap, checkpoint, text, tmp_path):
    run = attnswap(
        "plan", checkpoint, "--train_file", text, "--budget", "groups=1/2", "--output_dir", tmp_path / "out",
        "--context_length", 32, "--steps", 3, "--option", "window=4",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "3 of 6 key/value groups keep softmax, elsewhere window window=4" in run.out
    assert str(tmp_path / "out" / "plan.yaml") in run.err
    again = attnswap(
        "plan", checkpoint, "--train_file", text, "--budget", "heads=1/2", "--output_dir", tmp_path / "new"
    )
    assert again.code == 2 and again.err.count("\n") == 0 and "heads=1/2" in again.err
