"""Choices, minimal pairs and last words from local files, by hand."""

import json
import math
import sys

import pytest
import torch

from hf_attnswap import UsageError, cli
from hf_attnswap.evaluation import tasks
from hf_attnswap.evaluation.choices import Item, read_items, score_choices
from hf_attnswap.evaluation.result import Result, perplexity
from hf_attnswap.evaluation.tasks import TaskInputs, check_tasks, registry, run_tasks
from hf_attnswap.sources.models import load

CHOICES = [
    {"prompt": "Once upon a time, there was a little", "choices": ["girl", "of", "house in the big"], "answer": 0},
    {"query": "Lily liked to play with her", "choices": ["and", "toys", "upon"], "gold": 1},
    {"ctx": "They went to the park and", "endings": ["played", "time"], "label": 1},
    {"question": "The dog was very happy ", "choices": ["because he found a ball", "red"], "answer": 0},
    {"prompt": "Mom said", "choices": ["yes", "no"], "answer": 1},
]
PAIRS = [
    {"sentence_good": "She was happy.", "sentence_bad": "She were happy."},
    {"sentence_good": "They played in the park.", "sentence_bad": "They plays in the park."},
    {"sentence_good": "Dog the big ran.", "sentence_bad": "The big dog ran."},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    words = [{"context": "Once upon a", "continuation": "time"}, {"context": "Once upon a", "continuation": "dog"}]
    return {
        name: write(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("choices", CHOICES), ("pairs", PAIRS), ("words", words))
    }


def test_items_are_read_under_every_name(files):
    items = read_items(files["choices"])
    assert items[2] == Item("They went to the park and", ("played", "time"), 1)
    assert [item.answer for item in items] == [0, 1, 1, 0, 1]
    assert read_items(files["pairs"], limit=1) == [Item("", ("She was happy.", "She were happy."), 0)]
    assert len(read_items(files["words"])) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2, is no item: not JSON"),
        ('{"prompt": "a", "answer": 0}', "line 2, is no item: it has no choices; it has prompt, answer"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "line 2, is no item: 2 choices with answer 2"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "line 2, is no item: 1 choices with answer 0"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "line 2, is no item: 2 choices"),
        ("[1]", r"line 2, is no item: it is \[1]; expected an object"),
        ("null", "line 2, is no item: it is null; expected an object"),
        ('{"prompt": "a", "choices": "bc", "answer": 0}', "choices is 'bc'; expected a list of texts"),
        ('{"prompt": "a", "choices": {"text": ["b"]}, "answer": 0}', "choices is {'text': .*; expected a list"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 1.9}', "answer is 1.9; expected a whole number"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer is True; expected a whole number"),
        ('{"prompt": 3, "choices": ["b", "c"], "answer": 1}', "prompt is 3; expected a text"),
        ('{"sentence_good": "a", "sentence_bad": null}', "sentence_bad is null; expected a text"),
        ('{"context": "a", "continuation": ""}', "continuation is empty; expected a text"),
        ('{"context": "a", "continuation": "\\ud800"}', "half of a surrogate pair at 0"),
        ('{"sentence": "a b", "option1": "c", "option2": "d", "answer": "1"}', "sentence is 'a b'; expected one _"),
        ('{"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "3"}', "answer is '3'; expected 1 or 2"),
        ('{"sentence": "a _ b", "option1": "c", "answer": "1"}', "option2 is null; expected a text"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_item_is_refused_with_its_line(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(CHOICES[0]) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=says) as error:
        read_items(path)
    assert "line 2, is no item" in str(error.value) and "\n" not in str(error.value)


WINOGRANDE = [
    {"sentence": "Once upon a time a little _ was happy.", "option1": "girl", "option2": "of the", "answer": "1"},
    {"sentence": "Lily saw a dog. The _ ran to her.", "option1": "and", "option2": "dog", "answer": "2", "qID": "x"},
]


def test_items_of_winogrande(stories260k, tmp_path):
    """What stands behind the blank is scored after each option, as lm-eval does."""
    items = read_items(write(tmp_path / "winogrande.jsonl", WINOGRANDE))
    before = ("Once upon a time a little girl", "Once upon a time a little of the")
    assert items[0] == Item(before, ("was happy.", "was happy."), 0) and items[1].answer == 1
    model, tokenizer = load(stories260k)
    found = score_choices(model, tokenizer, items)
    assert found.acc_norm == []
    for item, acc in zip(items, found.acc, strict=True):
        values = []
        for prompt, choice in item.pairs:
            start, whole = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(whole).logits[0].log_softmax(-1)
            values.append(sum(logits[i - 1, whole[0, i]].item() for i in range(len(start), whole.shape[1])))
        assert acc == (values.index(max(values)) == item.answer)


def test_files_that_are_not_there_and_unknown_tasks_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not exist"):
        check_tasks([str(tmp_path / "no.jsonl")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        check_tasks([str(tmp_path / "empty.jsonl")])
    monkeypatch.setattr("hf_attnswap.evaluation.tasks.running.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'lm-eval is not installed: pip install "hf_attnswap\[eval\]"'):
        check_tasks(["needle", "hellaswag"])
    with pytest.raises(UsageError, match=r"Unknown task 'nedle'. Did you mean 'needle'\? Available: copy, likeness,"):
        check_tasks(["nedle"])
    with pytest.raises(UsageError, match="task 'writing' goes on from a text: give one by --validation_file"):
        check_tasks(["writing"], has_text=False)


def test_scores_by_hand(stories260k, files):
    """Against the model's own log-probabilities, item by item and without batches."""
    model, tokenizer = load(stories260k)
    items = read_items(files["choices"])
    found = score_choices(model, tokenizer, items, batch_size=4)
    for item, acc, normed in zip(items, found.acc, found.acc_norm, strict=True):
        values = []
        for choice in item.choices:
            prompt = item.prompt.rstrip()
            whole = tokenizer(
                f"{prompt}{' ' * (len(item.prompt) - len(prompt))} {choice}", return_tensors="pt"
            ).input_ids
            start = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                logits = model(whole).logits[0].log_softmax(-1)
            values.append(sum(logits[i - 1, whole[0, i]].item() for i in range(start, whole.shape[1])))
        assert acc == (values.index(max(values)) == item.answer)
        per_character = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
        assert normed == (per_character.index(max(per_character)) == item.answer)
    assert found.acc[:2] == [1.0, 1.0]
    words = score_choices(model, tokenizer, read_items(files["words"]))
    assert words.acc == [1.0, 0.0] and words.acc_norm == []
    with torch.no_grad():
        logits = model(tokenizer("Once upon a dog", return_tensors="pt").input_ids).logits[0].log_softmax(-1)
    start, whole = len(tokenizer("Once upon a").input_ids), tokenizer("Once upon a dog").input_ids
    expected = sum(logits[i - 1, whole[i]].item() for i in range(start, len(whole)))
    assert words.log_likelihood[1] == pytest.approx(expected, rel=1e-5)
    assert score_choices(model, tokenizer, read_items(files["pairs"])).acc == [1.0, 1.0, 0.0]


def test_an_item_that_is_too_long_is_refused(stories260k):
    model, tokenizer = load(stories260k)
    with pytest.raises(UsageError, match="tokens, and the model takes 512"):
        score_choices(model, tokenizer, [Item("Once upon a time. " * 200, ("a", "b"), 0)])


def test_single_choices_are_not_mixed_with_others(stories260k):
    model, tokenizer = load(stories260k)
    with pytest.raises(UsageError, match="some items have a single choice and others have several"):
        score_choices(model, tokenizer, [Item("Once", ("a",), 0), Item("Once", ("a", "b"), 0)])


def test_rows_have_errors_marks_and_paired_differences():
    ours, control = Result("t", "acc", (1.0, 0.0, 1.0, 1.0)), Result("t", "acc", (0.0, 0.0, 1.0, 0.0))
    row = ours.row(control)
    assert (row["value"], row["control"], row["items"], row["few"]) == (0.75, 0.25, 4, True)
    assert row["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert row["difference"]["value"] == 0.5 and row["difference"]["low"] is None and row["verdict"] is None
    eight = Result("t", "acc", (1.0, 0.0, 0.0, 1.0) * 2), Result("t", "acc", (0.0, 0.0, 1.0, 0.0) * 2)
    assert eight[0].row(eight[1])["verdict"] == "no measurable difference"
    many = Result("t", "acc", (1.0, 0.0) * 300), Result("t", "acc", (0.0, 0.0) * 300)
    assert not many[0].row()["few"] and many[0].row(many[1])["verdict"] == "better"
    assert Result("t", "loss", (1.0, 0.0) * 300, False).row(many[1])["verdict"] == "worse"


def test_a_metric_that_is_no_mean():
    """Perplexity over items: value by hand, error by the delta method, and lower is better."""
    draw = torch.Generator().manual_seed(0)
    told = tuple((torch.randn(600, generator=draw) - 3).tolist())
    worse = tuple(x - 0.1 for x in told)
    ours, control = (Result("t", "perplexity", x, False, perplexity) for x in (worse, told))
    row = ours.row(control)
    assert control.value == pytest.approx(math.exp(-sum(told) / 600))
    assert row["standard_error"] == pytest.approx(ours.value * torch.tensor(worse).std().item() / 600**0.5, rel=0.1)
    assert row["difference"]["value"] == pytest.approx(control.value * (math.exp(0.1) - 1))
    assert row["difference"]["low"] > 0 and row["verdict"] == "worse" and control.row(ours)["verdict"] == "better"
    assert Result("t", "perplexity", (-800.0,), False, perplexity).value == math.inf


def test_generated_and_local_tasks_together(stories260k, files):
    model, tokenizer = load(stories260k)
    inputs = TaskInputs(lengths=[160, 320], limit=2)
    results = run_tasks(
        model, tokenizer, ["needle", "recall", files["pairs"], files["choices"], files["words"]], inputs
    )
    labels = [(r.task, r.metric, len(r.scores)) for r in results]
    assert labels == [
        ("needle at 160", "found", 2), ("needle at 320", "found", 2),
        ("recall of 30 pairs in 101 tokens", "recalled", 2), ("recall of 30 pairs in 121 tokens", "recalled", 2),
        ("pairs", "acc", 2), ("pairs", "acc_norm", 2), ("choices", "acc", 2), ("choices", "acc_norm", 2),
        ("words", "acc", 2), ("words", "perplexity", 2),
    ]  # fmt: skip
    assert all(0 <= r.value <= 1 for r in results[:-1]) and results[-1].value > 1
    with pytest.raises(UsageError, match="a haystack of 20 tokens has no room"):
        run_tasks(model, tokenizer, ["needle"], TaskInputs(lengths=[20]))


TASK = '''
from dataclasses import dataclass

from hf_attnswap.evaluation.result import Result
from hf_attnswap.evaluation.tasks import Task, register


@register
@dataclass(frozen=True)
class FirstToken(Task):
    """Compare the likeliest first token with that of the control."""

    name = "first_token"
    measures = "Whether the model and its control begin a text of one token alike."
    texts: int = 5

    def answer(self, model, tokenizer, inputs):
        ids = inputs.tokens.reshape(-1)[: inputs.limit or self.texts, None]
        return model(input_ids=ids).logits[:, -1].argmax(-1).tolist()

    def run(self, model, tokenizer, inputs, control=None):
        pairs = zip(self.answer(model, tokenizer, inputs), control, strict=True)
        return [Result(self.name, "same", tuple(float(a == b) for a, b in pairs))]
'''


def test_a_task_is_one_file(stories260k, text_file, tmp_path, monkeypatch, capsys):
    """Found in the folder of tasks, listed, and run by both commands."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "first_token.py").write_text(TASK)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "tasks")])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    def attnswap(line):
        monkeypatch.setattr(sys, "argv", ["attnswap", *line.split()])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        assert not exit.value.code, err
        return out

    assert len(TASK.strip().splitlines()) <= 30
    assert "first_token" in registry.help_text()
    line = f"evaluate {stories260k} --control {stories260k} --validation_file {text_file} --context_length 64 "
    (row,) = json.loads(attnswap(line + "--max_eval_tokens 128 --tasks first_token --limit 3 --json"))["tasks"]
    assert (row["task"], row["metric"], row["value"], row["control"], row["items"]) == ("first_token", "same", 1, 1, 3)
    line = f"tradeoff {stories260k} --train_file {text_file} --output_dir {tmp_path / 'out'} --arm none --no_controls "
    line += "--context_length 64 --max_eval_tokens 128 --block_size 64 --align_tokens 0 --length 16 --rounds 1 "
    attnswap(line + "--decode_tokens 1 --tasks first_token")
    arms = json.loads((tmp_path / "out" / "report.json").read_text())["arms"]
    assert [arm["metrics"][0]["task"] for arm in arms] == ["first_token"] * 2 and arms[0]["metrics"][0]["value"] == 1
