"""Encoders fine-tuned on labelled texts: what the scripts save, measure, compare and refuse."""

import json
import random
import shutil
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_encoder
from training_fixtures import LAUNCH, finish
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.report import read, to_json
from hf_attnswap.sources.texts import TextSource
from hf_attnswap.training import loop

SWAP = ["--attention", "hedgehog", "--align_steps", "4"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, letters) -> str:
    folder = tmp_path_factory.mktemp("bert")
    tiny_encoder().save_pretrained(folder)
    letters.save_pretrained(folder)
    return str(folder)


def write_texts(path, count, seed):
    """Texts of 2 to 20 letters; the label says whether there are more of a to m than of n to z."""
    draw, lines = random.Random(seed), ["text\tlabel"]
    for _ in range(count):
        text = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 20)))
        early = sum(letter < "n" for letter in text) * 2 > len(text)
        lines.append(f"{text}\t{'early' if early else 'late'}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def arguments(encoder, tmp_path):
    """The command line of a short run; later options win."""
    given = dict(
        model_name_or_path=encoder, output_dir=tmp_path / "out", per_device_train_batch_size=8,
        train_file=write_texts(tmp_path / "train.tsv", 50, 0), max_length=16,
        validation_file=write_texts(tmp_path / "validation.tsv", 21, 1), per_device_eval_batch_size=4,
    )  # fmt: skip
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def read_log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("swap", [[], SWAP, ["--attention", "relu_power", "--option", "p=4", "--layers", "1:"]])
def test_the_saved_model_is_right_where_the_evaluation_says_so(script, arguments, tmp_path, swap):
    script("benchmarks/classify").main([*arguments, *swap])
    out = tmp_path / "out"
    found = json.loads((out / "evaluation.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    correct = []
    for text, label in TextSource(str(tmp_path / "validation.tsv")).labelled("label"):  # one by one: no padding
        ids = tokenizer(text, truncation=True, max_length=16, return_tensors="pt").input_ids
        correct.append(int(model.config.id2label[model(input_ids=ids).logits.argmax().item()] == label))
    assert found["correct"] == correct and found["accuracy"] == sum(correct) / 21
    assert model.config.attention_probs_dropout_prob == 0
    swapped = [module.swapped for module in hf_attnswap.inspect(model)]
    assert swapped == {0: [None] * 3, 4: ["hedgehog"] * 3, 6: [None, "relu_power", "relu_power"]}[len(swap)]
    assert [entry["texts"] for entry in read_log(out)] == [8, 16, 24, 32, 40, 48]
    aligned = [entry["loss"] for entry in read_log(out / "alignment")] if swap == SWAP else None
    assert found["alignment"] == (aligned and {"steps": 4, "first_loss": aligned[0], "last_loss": aligned[-1]})


def test_all_weights_train_and_the_head_starts_alike(script, arguments, tmp_path, monkeypatch):
    classify, starts = script("benchmarks/classify"), []
    fine_tune = classify.fine_tune

    def look(args, accelerator, model, *more):
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return fine_tune(args, accelerator, model, *more)

    monkeypatch.setattr(classify, "fine_tune", look)
    classify.main([*arguments, "--output_dir", str(tmp_path / "softmax")])
    classify.main([*arguments, *SWAP])
    softmax, swapped = starts
    assert all(torch.equal(tensor, swapped[name]) for name, tensor in softmax.items())
    assert all(swapped[name].any() for name in swapped.keys() - softmax.keys())  # deltas: zero before the alignment
    trained = weights(tmp_path / "out")
    still = ("position_embeddings", "token_type", "marker")
    unused = {name for name in trained if any(part in name for part in still)}
    assert not any(torch.equal(trained[name], swapped[name]) for name in trained.keys() - unused)


def test_a_conversion_trains_as_it_is(script, arguments, tmp_path):
    script("benchmarks/classify").main([*arguments, *SWAP])
    more = ["--model_name_or_path", str(tmp_path / "out" / "model"), "--output_dir", str(tmp_path / "more")]
    found = script("benchmarks/classify").main([*arguments, *more])
    assert found["attention"] == "hedgehog in 3 bidirectional layers" and found["alignment"] is None


@pytest.mark.parametrize("cut_at", ["alignment", pytest.param("out", marks=pytest.mark.long)])
def test_resuming_ends_with_the_same_weights(script, arguments, tmp_path, monkeypatch, cut_at):
    classify, save_checkpoint = script("benchmarks/classify"), loop.save_checkpoint
    arguments = [*arguments, *SWAP, "--checkpointing_steps", "2"]
    classify.main([*arguments, "--output_dir", str(tmp_path / "whole")])

    def cut(state, output_dir, run):
        save_checkpoint(state, output_dir, run)
        if output_dir.name == cut_at:
            raise ConnectionError("power cut")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(loop, "save_checkpoint", cut)
        classify.main(arguments)
    classify.main([*arguments, "--resume_from_checkpoint", "latest"])
    whole, resumed = tmp_path / "whole", tmp_path / "out"
    for part in (".", "alignment"):
        assert [e["loss"] for e in read_log(whole / part)] == [e["loss"] for e in read_log(resumed / part)]
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (whole, resumed))
    assert first == second


@pytest.mark.parametrize(
    "more, message",
    [
        (["--text_column", "body"], "has no column 'body'; it has text, label"),
        (["--label_column", "class"], "has no column 'class'"),
        (["--per_device_train_batch_size", "51"], "has 50 texts, less than one batch of 51"),
        (["--max_train_samples", "1"], "has one label only"),
        (["--layers", "1:"], "--layers and --option belong to --attention"),
        (["--attention", "hedgehog+window"], "hedgehog\\+window is for causal attention only"),
        (["--model_name_or_path", "nowhere"], "cannot load the model 'nowhere'"),
    ],
)
def test_wrong_use(script, arguments, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        script("benchmarks/classify").main([*arguments, *more])
    assert not (tmp_path / "out").exists()


def test_a_label_that_was_not_trained_on(script, arguments, tmp_path):
    (tmp_path / "validation.tsv").write_text("text\tlabel\nabc\tnever\n")
    with pytest.raises(UsageError, match="label 'never' is not among those of the training file: late, early"):
        script("benchmarks/classify").main(arguments)


def test_groups_hold_every_text_once_and_little_padding(script):
    classify = script("benchmarks/classify")
    rows = torch.full((10, 9), classify.EMPTY)
    for i, length in enumerate([3, 8, 1, 5, 8, 2, 4, 4, 7, 6]):
        rows[i, : 1 + length] = i
    groups = classify.by_length(rows, 2)
    assert groups.shape == (5, 2, 9)
    assert sorted(groups[:, :, 0].flatten().tolist()) == list(range(10))
    assert classify.lengths(groups.flatten(0, 1)).tolist() == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert classify.by_length(rows, 3).shape == (3, 3, 9)


def test_groups_are_drawn_by_their_tokens(script):
    classify = script("benchmarks/classify")
    groups = torch.full((2, 2, 31), classify.EMPTY)
    groups[0, :, :11] = 0  # texts of 10 tokens
    groups[1] = 1  # of 30
    drawn = classify.by_tokens(groups, 4000, seed=0)
    assert drawn.shape == (4000, 2, 31)
    assert drawn[:, 0, 0].float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drawn, classify.by_tokens(groups, 4000, seed=0))
    assert not torch.equal(drawn, classify.by_tokens(groups, 4000, seed=1))


def test_accuracy_has_wilsons_interval(script):
    found = script("benchmarks/classify").accuracy([1] * 10)
    assert found["accuracy"] == 1 and found["standard_error"] == 0
    assert found["interval_95"] == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert script("benchmarks/classify").accuracy([1, 0] * 50)["interval_95"] == pytest.approx(
        [0.4038, 0.5962], abs=1e-4
    )


@pytest.fixture
def comparison(script, arguments, tmp_path):
    module = script("benchmarks/classify_all")
    arguments = [*arguments, "--align_steps", "2", "--output_dir", str(tmp_path / "all")]
    return lambda *more: module.main([*arguments, "--arm", "none", "--arm", "hedgehog", *more])


@pytest.mark.long
def test_a_comparison_trains_every_arm_once(comparison, script, tmp_path, monkeypatch, capsys):
    report = comparison("--title", "A | title")
    assert [arm.label for arm in report.arms] == ["softmax", "none", "hedgehog"]
    assert report.seeds == [0, 1] and report.kind == "classification" and report.title == "A | title"
    softmax, _, hedgehog = report.arms
    runs = tmp_path / "all" / "runs"
    assert {path.name for path in runs.iterdir()} == {
        f"{arm}_{seed}" for arm in ("softmax", "none", "hedgehog") for seed in (0, 1)
    }
    assert not list(runs.glob("*/model"))
    by_seed = [json.loads((runs / f"hedgehog_{seed}" / "evaluation.json").read_text())["accuracy"] for seed in (0, 1)]
    (accuracy,), (control,) = hedgehog.metrics, softmax.metrics
    assert accuracy.by_seed == by_seed and accuracy.value == pytest.approx(sum(by_seed) / 2)
    assert accuracy.difference.value == pytest.approx(accuracy.value - control.value) and control.difference is None
    if control.value:
        assert accuracy.ratio.value == pytest.approx(accuracy.value / control.value)
    written = (tmp_path / "all" / "report.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(to_json(report))) and str(tmp_path) not in written
    assert to_json(read(tmp_path / "all" / "report.json")) == to_json(report)
    assert [stage.stage for stage in hedgehog.training] == ["align", "finetune"]
    assert hedgehog.training[0].steps == 2 and hedgehog.swapped[0].kind == "bidirectional"
    assert hedgehog.speed[0].forward_speedup.runs == 7 and softmax.speed[0].forward_speedup is None
    page = (tmp_path / "all" / "report.md").read_text()
    assert "hedgehog" in capsys.readouterr().out and (tmp_path / "all" / "report.html").is_file()
    assert page.startswith("# A \\| title\n") and "| hedgehog | O(n d 2d) (linear) | " in page

    def trains_again(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(script("benchmarks/classify"), "main", trains_again)
        again = comparison("--title", "A | title")
        for arm, before in zip(again.arms, report.arms, strict=True):
            assert replace(arm, speed=[]) == replace(before, speed=[])
    with pytest.raises(UsageError, match="holds a run with other arguments"):
        comparison("--learning_rate", "1e-3")


@pytest.mark.long
def test_an_arm_that_fails_is_reported(comparison, script, monkeypatch):
    classify = script("benchmarks/classify")
    real = classify.main

    def main(command):
        if "none" in command:
            raise FloatingPointError("the loss is nan")
        return real(command)

    monkeypatch.setattr(classify, "main", main)
    report = comparison("--num_seeds", "1")
    assert report.arms[1].status == "failed" and report.arms[1].reason == "the loss is nan"
    assert report.arms[2].metrics[0].value <= 1


@pytest.mark.parametrize("more", [["--attention", "elu"], ["--layers", "1:"], ["--resume_from_checkpoint", "latest"]])
def test_a_comparison_says_which_arguments_are_its_own(comparison, more):
    with pytest.raises(UsageError, match="are set for each arm"):
        comparison(*more)


def test_intervals_are_paired(script):
    """Two runs that are wrong in the same places differ by nothing, however few the texts."""
    correct = {"softmax": [1, 0, 1, 1] * 10, "elu": [1, 0, 1, 1] * 10, "identity": [1, 0, 0, 1] * 10}
    found = script("benchmarks/classify_all").compare({name: [marks] for name, marks in correct.items()})
    softmax, elu, identity = found.values()
    assert softmax.value == 0.75 and softmax.low < 0.75 < softmax.high
    assert (elu.difference.value, elu.difference.low, elu.difference.high) == (0, 0, 0)
    assert elu.difference.verdict == "no measurable difference" and identity.difference.verdict == "worse"
    assert identity.difference.value == -0.25 and identity.ratio.value == pytest.approx(2 / 3)
    # 10 of 40 lost: a standard error of sqrt(0.25 * 0.75 / 40) = 0.068
    assert identity.difference.low == pytest.approx(-0.25 - 1.96 * 0.068, abs=0.03)
    assert identity.difference.high == pytest.approx(-0.25 + 1.96 * 0.068, abs=0.03)


@pytest.mark.long
def test_two_processes_train_as_one_that_accumulates(process, script, arguments, encoder, tmp_path):
    config = json.loads((Path(encoder) / "config.json").read_text())
    shutil.copytree(encoder, tmp_path / "encoder")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))
    arguments = [*arguments, "--model_name_or_path", str(tmp_path / "encoder")]
    more = [*SWAP, "--learning_rate", "1e-3"]
    config = ["--config_file", "examples/configs/multi_cpu.yaml", "benchmarks/classify.py"]
    finish(process(*LAUNCH, *config, *arguments, *more, "--output_dir", tmp_path / "two"))
    one = [*arguments, *more, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]
    script("benchmarks/classify").main(one)
    for part in (".", "alignment"):
        two, one = ([entry["loss"] for entry in read_log(tmp_path / name / part)] for name in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-3 if part == "." else 1e-4)
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("two", "one")]
    assert len(evaluations[0]["correct"]) == len(evaluations[1]["correct"]) == 21


@pytest.mark.long
def test_hedgehog_recovers_the_accuracy_of_a_real_encoder(script, minilm, sst2, tmp_path):
    """A fraction of the run in benchmarks/results/sst2/report.md."""
    given = dict(
        model_name_or_path=minilm, train_file=sst2 / "train.tsv", validation_file=sst2 / "test.tsv",
        text_column="sentence", max_length=64, max_train_samples=2048, learning_rate=2e-4, align_steps=150,
    )  # fmt: skip
    command = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    found = {
        name: script("benchmarks/classify").main([*command, *more, "--output_dir", str(tmp_path / name)])["accuracy"]
        for name, more in (("softmax", []), ("hedgehog", ["--attention", "hedgehog"]))
    }
    assert found["softmax"] > 0.75
    assert found["hedgehog"] > 0.95 * found["softmax"]
