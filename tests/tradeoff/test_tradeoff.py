"""The comparison from end to end on a tiny model: what it measures, what it adds, what it refuses."""

import json
import math
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from encoders import bert, sentences, words_tokenizer
from tiny_models import tiny
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from hf_attnswap import UsageError, attentions, native, report, swap
from hf_attnswap.evaluation.tasks.writing import WritingTask, agreement, continuations
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.report.pages import paper
from hf_attnswap.sources.texts import TextSource, token_blocks
from hf_attnswap.statistics import paired_bootstrap
from hf_attnswap.tradeoff import Arm, Settings, measure, with_controls
from hf_attnswap.tradeoff.arms import build
from hf_attnswap.tradeoff.rows import row
from hf_attnswap.tradeoff.speed import training_step

LABELS = ("softmax", "elu")


class Letters:
    """A tokenizer of bytes, as far as `token_blocks` and `count_units` know one."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [3 + b % 60 for b in text.encode()]})

    def decode(self, ids, **_):
        return "".join("a " if i % 2 else "b" for i in map(int, ids))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The cat sat on the mat, and then it went out into the rain. " * 50)
    return TextSource(str(path))


def settings(**changes):
    given = dict(
        arms=("softmax", "window:window=4,sinks=1", "elu", "elu+window:window=4,sinks=1"),
        context_lengths=(32,), max_eval_tokens=256, lengths=(16, 32), rounds=2, decode_tokens=2, align_tokens=0,
        block_size=32, diagnose_tokens=24, train_lengths=(32,),
    )  # fmt: skip
    return Settings(**given | changes)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "pairs.jsonl"
    items = [{"prompt": f"{i} cats", "choices": ["sat", "ran"], "answer": i % 2} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, items)))
    return {"tasks": (str(path), "writing"), "task_limit": 8}


@pytest.fixture(scope="module")
def measured(text, tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tradeoff") / "out"
    found = measure(tiny(), Letters(), text, None, settings(**tasks), folder, model_name="tiny", command="test")
    return found, folder


def test_the_report_is_valid_and_can_be_drawn(measured, tmp_path):
    found, _ = measured
    report.write_all(found, tmp_path)
    written = report.read(tmp_path / "report.json")
    assert [arm.label for arm in written.arms] == [arm.label for arm in found.arms]
    assert (tmp_path / "layers.png").is_file() and (tmp_path / "positions.png").is_file()


def test_perplexity_and_paired_comparisons(measured):
    arms = {arm.label: arm for arm in measured[0].arms}
    assert {arm.status for arm in arms.values()} == {"measured"}
    softmax, hybrid = (arms[label].perplexity[0] for label in ("softmax", "elu+window:window=4,sinks=1"))
    assert softmax.ratio is None and {a.arm for a in softmax.against} == set(arms) - {"softmax"}
    assert hybrid.ratio.value == pytest.approx(hybrid.perplexity / softmax.perplexity)
    assert hybrid.ratio.items == 8 and hybrid.ratio.few
    (against,) = [a for a in hybrid.against if a.arm == "elu"]
    assert against.value == pytest.approx(hybrid.perplexity / arms["elu"].perplexity[0].perplexity)
    assert math.log(softmax.word_perplexity) > math.log(softmax.perplexity)
    assert softmax.by_position[-1].last == 31


def test_the_report_says_which_form_of_which_op_ran(measured):
    arms = {arm.label: arm.backends for arm in measured[0].arms}
    form = "torch" if native.missing() else "cpu"
    assert arms["softmax"] == {} and arms["elu"] == {"linear": [form]}
    assert arms["elu+window:window=4,sinks=1"] == {"hybrid": [form]}
    assert f"| linear: {form} |" in paper(measured[0], [])


def test_tasks_are_compared_on_the_same_items(measured, text):
    arms = {arm.label: arm.metrics for arm in measured[0].arms}
    hybrid, kept = arms["elu+window:window=4,sinks=1"], measured[1] / "measured"
    names = [(entry.task, entry.metric, entry.items) for entry in hybrid]
    assert names == [
        ("pairs", "acc", 8), ("pairs", "acc_norm", 8), ("writing", "tokens as the control's", 8),
        ("writing", "tokens before the first other", 8), ("writing", "agreement when told the control's", 8),
        ("writing", "repetition", 8),
    ]  # fmt: skip
    assert all(entry.difference.few for entry in hybrid)
    assert [entry.value for entry in arms["softmax"]][2:5] == [1, 64, 1]
    assert all(entry.difference is None for entry in arms["softmax"])
    for entry, softmax, linear in zip(hybrid, arms["softmax"], arms["elu"], strict=True):
        assert entry.difference.value == pytest.approx(entry.value - softmax.value)
        (against,) = [found for found in entry.against if found.arm == "elu"]
        assert against.value == pytest.approx(entry.value - linear.value)
    # The interval is that of a paired bootstrap over the items.
    swapped, original = swap(tiny(), "elu"), tiny()
    written = torch.tensor(json.loads((kept / "answers.json").read_text())["writing"])
    assert written.shape == (8, 64)
    tokens = token_blocks(text, Letters(), 32)
    starts = tokens[-math.ceil(len(tokens) / 5) :].reshape(-1)[: 8 * 64].view(8, 64)
    assert torch.equal(continuations(original, starts, 64), written)
    ours, control = (agreement(model, starts, written).same for model in (swapped, original))
    expected = paired_bootstrap(ours, control, resamples=4000)
    found = arms["elu"][2].difference
    assert found.value == pytest.approx(expected.value) and found.verdict == expected.verdict()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_a_training_step_is_timed_where_it_was_asked_for(measured):
    softmax, *arms = measured[0].arms
    assert [entry.train_s is None for entry in softmax.speed] == [True, False]
    assert softmax.speed[-1].train_speedup is None and softmax.growth == {}
    for arm in arms:
        assert arm.speed[-1].train_s.runs == 2 and arm.speed[-1].train_s.low > 0
        assert arm.speed[-1].train_speedup.runs == 2


def test_a_training_step_leaves_the_model_as_it_was():
    model = tiny()
    frozen = model.lm_head.weight.requires_grad_(False)
    assert training_step(model, torch.arange(3, 19)[None]) > 0
    assert all(p.grad is None for p in model.parameters())
    assert [p is frozen for p in model.parameters() if not p.requires_grad] == [True]


def test_checks_growth_and_layers(measured):
    softmax, *arms = measured[0].arms
    assert softmax.checks == [] and softmax.diagnostics is None
    for arm in arms:
        assert [c.name for c in arm.checks] == ["causal", "padding", "state", "definition", "seam"]
        assert all(c.passed for c in arm.checks)
        assert sorted(arm.diagnostics.layers_by_damage) == [0, 1, 2]
        assert arm.diagnostics.tokens == 24 and len(arm.diagnostics.layers) == 3
        assert arm.growth == {}  # two lengths say nothing of growth


def test_an_interrupted_run_goes_on(measured, text, tasks):
    found, folder = measured
    (folder / "measured" / "elu.json").unlink()
    said = []
    given = settings(**tasks)
    again = measure(
        tiny(), Letters(), text, None, given, folder, model_name="tiny", command="test", observe=said.append
    )
    lines = dict.fromkeys(progress.line for progress in said)
    assert [line for line in lines if "perplexity" in line] == ["elu: perplexity at context 32"]
    assert 0.5 < said[0].done / said[0].total < 1 and said[-1].done == pytest.approx(said[-1].total)
    assert again.arms == found.arms


def test_growth_of_three_lengths_and_three_rounds():
    """Of softmax n^2, of the arm n, in every round."""
    cls = attentions.get("elu")
    runs = {
        str(n): [
            {"softmax": {"prefill_s": 1e-6 * n * n, "cache_bytes": 8, "peak_memory_mib": None}}
            | {"elu": {"prefill_s": 1e-4 * n, "cache_bytes": 4, "peak_memory_mib": 2.0}}
        ]
        * 3
        for n in (100, 200, 400)
    }
    empty = {"status": "measured", "reason": None, "alignment": None, "new_parameters": 0, "nll": {}, "checks": []}
    empty |= {"by_position": {}, "diagnostics": None, "tasks": [], "swapped": [], "kept": 0, "kept_groups": [0, 3],
              "backends": {}}  # fmt: skip
    empty |= {"sound": True, "given": 1}
    softmax, elu = (row(Arm(name, name, {}), dict.fromkeys(("softmax", "elu"), empty), runs, {}) for name in LABELS)
    assert softmax.growth["prefill_s"].exponent == pytest.approx(2) and set(softmax.growth) == {"prefill_s"}
    assert elu.growth["prefill_s"].exponent == pytest.approx(1) and elu.growth["prefill_s"].lengths == 3
    assert elu.growth["prefill_s"].low == pytest.approx(1) and elu.formula == cls.formula
    assert elu.speed[2].prefill_speedup.median == pytest.approx(4) and elu.speed[2].peak_memory_mib == 2
    assert softmax.speed[0].prefill_speedup is None and softmax.speed[0].cache_mib == 8 / 2**20


def test_every_step_says_how_much_of_the_whole_is_done(text, tmp_path):
    said = []
    given = settings(arms=("softmax", "hedgehog"), align_tokens=64, diagnose_tokens=0)
    measure(tiny(), Letters(), text, None, given, tmp_path, model_name="tiny", command="test", observe=said.append)
    shares = [progress.done / progress.total for progress in said]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert len({progress.total for progress in said}) == 1
    after = [share for share, progress in zip(shares, said, strict=True) if "alignment step 2 of 2" in progress.line]
    before = [share for share, progress in zip(shares, said, strict=True) if "alignment step 1 of 2" in progress.line]
    assert min(before) < min(after)  # the alignment counts as it goes


@pytest.mark.long
@pytest.mark.parametrize("line", ("elu: checks", "elu: speed at 32 tokens, round 2 of 2"))
def test_what_was_measured_survives_kill_9(stories260k, text_file, tmp_path, line):
    told = f"tradeoff {stories260k} --train_file {text_file} --output_dir {tmp_path / 'out'} --arm elu --no_controls "
    told += "--context_length 64 --max_eval_tokens 256 --block_size 64 --align_tokens 0 --decode_tokens 1 --rounds 2 "
    told += "--length 16 --length 32 --json"
    program = "import hf_attnswap.cli.progress as p; p.SELDOM_S = 0; from hf_attnswap.cli import main; main()"
    command = [sys.executable, "-c", program, *shlex.split(told)]
    kept = tmp_path / "out" / "measured"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while line not in said and process.poll() is None:
            said = process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out" / "report.json").exists()
    before = {file.name: json.loads(file.read_text()) for file in kept.glob("*.json")}
    assert set(before) == {"settings.json", "softmax.json"} | ({"elu.json", "speed.json"} if "speed" in line else set())

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = again.stderr.splitlines()
    assert any(said.endswith("] softmax: already measured") for said in lines)
    assert not any("softmax: perplexity" in said for said in lines)
    assert any(said.endswith("] elu: checks") for said in lines) == ("elu.json" not in before)
    after = {file.name: json.loads(file.read_text()) for file in kept.glob("*.json")}
    for name in set(before) - {"speed.json"}:
        assert after[name] == before[name]
    for length, rounds in before.get("speed.json", {}).items():
        assert after["speed.json"][length][: len(rounds)] == rounds
    found = json.loads(again.stdout)
    assert found == report.to_json(report.read(tmp_path / "out" / "report.json"))
    assert [entry["prefill_s"]["runs"] for arm in found["arms"] for entry in arm["speed"]] == [2] * 4
    if "speed" in line:  # round 1 of both lengths, and 2 of the first, are those of the run that was killed
        assert {length: len(rounds) for length, rounds in before["speed.json"].items()} == {"16": 2, "32": 1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_eval_tokens": 63}, "max_eval_tokens is 63, less than two blocks of 32"),
        ({"lengths": (32, 10_000)}, "10000 and 32 are needed"),
        ({"train_lengths": (64,)}, r"train_lengths has 64, which is none of the lengths \[16, 32\]"),
        ({"tasks": ("needle",)}, "a haystack of 32 tokens has no room"),
        ({"tasks": ("no_such.jsonl",)}, "no_such.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused(text, tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        measure(tiny(), Letters(), text, None, settings(**changes), tmp_path, model_name="tiny", command="test")


def run(text, folder, model=None, **changes):
    model, given = model or tiny(), settings(**{"rounds": 1, "train_lengths": (), "lengths": (16,)} | changes)
    return measure(model, Letters(), text, None, given, folder, model_name="tiny", command="test")


def gpt2(positions=64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=positions, attn_pdrop=0.0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": (16, 63)}, "--length 63 with --decode_tokens 2 takes 65 tokens"),
        ({"context_lengths": (80,)}, "--context_length takes 80 tokens"),
        ({"diagnose_tokens": 65}, "--diagnose_tokens takes 65 tokens"),
        ({"arms": ("hedgehog",), "align_tokens": 64, "block_size": 65}, "--block_size takes 65 tokens"),
    ],
)
def test_what_the_model_has_no_positions_for_is_said_before_anything_runs(text, tmp_path, changes, says):
    with pytest.raises(UsageError, match=f"{says}, and GPT2LMHeadModel has learned positions for 64: give at most 64"):
        run(text, tmp_path / "out", gpt2(), **changes)
    assert not (tmp_path / "out").exists()


class Limited(torch.nn.Module):
    """Stands in the place of a layer of a model and raises where it reads more than `longest` tokens."""

    def __init__(self, layer, longest):
        super().__init__()
        self.layer, self.longest = layer, longest

    def forward(self, ids):
        if ids.shape[1] > self.longest:
            raise IndexError("index out of range in self")
        return self.layer(ids)


def test_one_failing_length_takes_nothing_else_along(text, tmp_path):
    """Of softmax too, and whatever a model raises."""
    model = tiny()
    model.model.embed_tokens = Limited(model.model.embed_tokens, 60)
    found = run(
        text, tmp_path / "out", model, arms=("elu",), context_lengths=(32, 64), lengths=(16, 62), train_lengths=(62,),
        diagnose_tokens=0,
    )  # fmt: skip
    softmax, elu = found.arms
    reason = "perplexity at context 64: index out of range in self"
    assert (softmax.status, softmax.reason) == ("failed", reason)
    assert [entry.context for entry in softmax.perplexity] == [32] and elu.perplexity[0].ratio is not None
    short, long = softmax.speed
    assert short.prefill_s is not None and short.note is None
    assert long.prefill_s is None and long.note == "index out of range in self"
    report.validate(found)
    assert reason in paper(found, [])


def test_one_failing_task_takes_no_other_along(text, tasks, tmp_path, monkeypatch):
    def fails(self, model, *given):
        if swapped_modules(model):
            raise KeyError("lost")
        return original(self, model, *given)

    original = WritingTask.run
    monkeypatch.setattr(WritingTask, "run", fails)
    found = run(text, tmp_path / "out", arms=("elu", "relu"), diagnose_tokens=0, **tasks)
    softmax, *arms = found.arms
    assert len(softmax.metrics) == 6 and softmax.status == "measured"
    for arm in arms:
        assert (arm.status, arm.reason) == ("failed", "writing: 'lost'")
        assert [entry.task for entry in arm.metrics] == ["pairs", "pairs"] and arm.metrics[0].difference is not None
        assert arm.perplexity and arm.speed[0].prefill_s is not None


def test_an_arm_that_cannot_be_swapped_takes_no_other_along(text, tmp_path, monkeypatch):
    def fails(arm, *given):
        if arm.attention == "relu":
            raise MemoryError
        return build(arm, *given)

    monkeypatch.setattr("hf_attnswap.tradeoff.quality.build", fails)
    found = run(text, tmp_path / "out", arms=("relu", "elu"), diagnose_tokens=0)
    assert [(arm.label, arm.status, arm.reason) for arm in found.arms] == [
        ("softmax", "measured", None), ("relu", "failed", "MemoryError()"), ("elu", "measured", None),
    ]  # fmt: skip
    assert [len(arm.speed) for arm in found.arms] == [1, 0, 1]


def test_a_conversion_alone_and_two_of_one_name(stories260k, text_file, tmp_path, attnswap):
    line = ["tradeoff", stories260k, "--train_file", text_file, "--no_controls", "--context_length", 32]
    line += ["--max_eval_tokens", 128, "--block_size", 32, "--length", 16, "--rounds", 1, "--align_tokens", 0, "--json"]
    for folder in ("a", "b"):
        given = ["--output_dir", tmp_path / folder / "same", "--attention", "relu_norm"]
        assert attnswap("convert", stories260k, *given).code == 0
    result = attnswap(*line, "--arm", tmp_path / "a" / "same", "--output_dir", tmp_path / "out")
    assert result.code == 0, result.err
    assert [arm["label"] for arm in json.loads(result.out)["arms"]] == ["softmax", "relu_norm of same"]
    both = ["--arm", tmp_path / "a" / "same", "--arm", tmp_path / "b" / "same"]
    result = attnswap(*line, *both, "--output_dir", tmp_path / "two")
    assert result.code == 2 and "two arms are called 'relu_norm of same' and 'relu_norm of same'" in result.err


@pytest.mark.parametrize(
    ("cls", "metrics"),
    [(BertForMaskedLM, ["accuracy", "pseudo-perplexity"]), (BertForSequenceClassification, ["agreement", "cosine"])],
)
def test_models_that_predict_no_next_tokens(tmp_path, cls, metrics):
    (tmp_path / "text.txt").write_text(sentences())
    text = TextSource(str(tmp_path / "text.txt"))
    given = settings(
        arms=("hedgehog",), context_lengths=(16,), max_eval_tokens=64, lengths=(8, 16), train_lengths=(16,),
        block_size=16, align_tokens=32, rounds=1, diagnose_tokens=16 if cls is BertForMaskedLM else 0, task_limit=8,
    )  # fmt: skip
    found = measure(
        bert(cls), words_tokenizer(), text, text, given, tmp_path / "out", model_name="bert", command="test"
    )
    softmax, arm = found.arms
    assert [a.status for a in found.arms] == ["measured", "measured"], arm.reason
    assert [check.name for check in arm.checks] == ["padding", "definition", "seam"] and arm.alignment.tokens == 32
    assert arm.perplexity == [] and [entry.metric for entry in arm.metrics] == metrics
    assert all(entry.difference.items == 8 for entry in arm.metrics)
    assert all(entry.forward_s and not entry.prefill_s for entry in (*softmax.speed, *arm.speed))
    assert arm.speed[1].forward_speedup.runs == 1 and arm.speed[1].train_speedup.runs == 1
    assert (arm.diagnostics is not None) == (cls is BertForMaskedLM)
    report.validate(found)
    assert "refill" not in paper(found, []) and "Forward pass: " in paper(found, [])


def test_texts_that_are_compared_one_by_one_are_held_out(text, tmp_path):
    with pytest.raises(UsageError, match="held-out ones: give them by --validation_file"):
        run(text, tmp_path, bert(BertForSequenceClassification), diagnose_tokens=0)
    with pytest.raises(UsageError, match="BertModel predicts no tokens"):
        run(text, tmp_path, bert(BertModel))


def test_a_run_with_other_settings_is_not_continued(measured, text):
    with pytest.raises(UsageError, match="holds a run with rounds = 2, not 3"):
        measure(tiny(), Letters(), text, None, settings(rounds=3), measured[1], model_name="tiny", command="test")


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (["relu"], ["softmax", "none", "window", "relu"]),
        (["elu+window"], ["softmax", "none", "window", "elu", "elu+window"]),
        (
            ["hedgehog+window:window=32"],
            ["softmax", "none", "window:window=32", "hedgehog", "hedgehog+window:window=32"],
        ),
        (["elu+window", "elu", "window", "softmax"], ["none", "elu+window", "elu", "window", "softmax"]),
        (["window:window=8"], ["softmax", "none", "window", "window:window=8"]),
    ],
)
def test_controls_are_there_by_default(arms, expected):
    assert with_controls(arms) == expected
