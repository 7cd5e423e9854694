"""Command lines: every one ends with exit code 0, or with 2 and one line; what it leaves is whole."""

import contextlib
import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from drawn import texts
from hypothesis import strategies as st
from refusals import EXAMPLES, every, files_in, in_time, is_sentence
from tiny_models import tiny

import hf_attnswap
from hf_attnswap import cli
from hf_attnswap.errors import one_line_errors
from hf_attnswap.evaluation.__main__ import main as measure
from hf_attnswap.training.command import main as train

REPORT = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "report.json"
ATTNSWAP, TRAINING, EVALUATION = "attnswap", "hf_attnswap.training", "hf_attnswap.evaluation"
# What costs more than a second names a model that is not there, or a folder that is not empty.
LINES = (
    "attnswap ls hedgehog --json",
    "attnswap inspect {llama} --json",
    "attnswap convert {llama} --attention window --option window=8 --layers 0,1 --kind causal --output_dir {out}",
    "attnswap convert {llama} --attention relu_power --option p=4 --dtype float32 --portable --output_dir {out}",
    "attnswap evaluate {llama} --validation_file {text} --context_length 16 --max_eval_tokens 64 --stride 8 --json",
    "attnswap evaluate {llama} --control {converted} --tasks {items} --limit 1 --batch_size 2 --seed 3 --dtype float32",
    "attnswap diagnose {llama} --attention relu --validation_file {text} --context_length 8 --texts 1 --layers 1::2",
    "attnswap bench nowhere --attention elu --length 8 --rounds 1 --threads 1 --batch_size 1 --dtype float32",
    "attnswap tradeoff {llama} --output_dir {full} --train_file {text} --arm elu --context_length 8 --length 8",
    "attnswap tradeoff nowhere --output_dir {out} --train_file {text} --arm relu_power:p=8 --no_controls --rounds 1",
    "attnswap report {report}",
    "attnswap report {report} {report} --json",
    "attnswap card {converted} user/name --report {report} --output_dir {out} --base_model none --license mit",
    "attnswap push {converted} user/name --dry_run --base_model org/base --license mit --revision main --private",
    "attnswap run nothing --model x",
    "hf_attnswap.training finetune --model_name_or_path {llama} --attention elu --train_file {text} "
    "--max_train_steps 1 --block_size 8 --learning_rate 1e-3 --seed 1 --layers 0,1 --output_dir {out}",
    "hf_attnswap.training align --model_name_or_path {llama} --attention hedgehog --train_file {text} --block_size 8 "
    "--max_train_tokens 16 --per_device_train_batch_size 1 --num_warmup_steps 1 --output_dir {out}",
    "hf_attnswap.training --recipe plain --model_name_or_path {llama} --attention relu --train_file {text} "
    "--max_train_tokens 64 --output_dir {full}",
    "hf_attnswap.evaluation --model_name_or_path {llama} --validation_file {text} --context_length 16 "
    "--max_eval_tokens 64 --output_file {out}.json",
    "attnswap diagnose {converted} --validation_file {text} --context_length 8 --texts 1 "
    "--output_file {out}.json --json",
)
# A file that is absolute would be one of this machine's; what is only a name lies in the folder of the test.
named = texts.filter(lambda text: "\0" not in text and not text.startswith(("/", "~")) and len(text) < 300)
numbers = st.sampled_from(
    "-1 0 1 2 0.5 1e-9 1e400 nan -inf 1e3 4294967296 999999999999999999999999999999 1_0 \u0663".split()
)
known = st.sampled_from(
    "{llama} {converted} {text} {items} {full} {report} relu elu:layers=1::2 softmax bfloat16 float8_e4m3fn complex64 "
    "meta cuda:9 1::2 0,0 window=8 needle needle,recall cross --json".split()
)
words = st.one_of(named, numbers, known)


@st.composite
def lines(draw):
    """The words of a command line, of which up to three are others, missing, new or there twice."""
    line = shlex.split(draw(st.sampled_from(LINES)))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(1, len(line) - 1))
        what = draw(st.sampled_from(("other", "other", "missing", "new", "twice")))
        if what == "missing" and len(line) > 2:
            del line[place]
        elif what == "twice":
            line[place:place] = line[place : place + 2]
        else:
            line[place : place + (what == "other")] = [draw(words)]
    return line


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory, letters) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("llama", tiny()), ("converted", hf_attnswap.swap(tiny(), "relu"))):
        model.save_pretrained(folder / name)
        letters.save_pretrained(folder / name)
    return folder


@pytest.fixture
def places(models_folder, tmp_path, text) -> dict[str, str]:
    """What the placeholders of the lines stand for."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    rows = [{"prompt": "the", "choices": ["cat", "mat"], "answer": i % 2} for i in range(2)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"text": text, "report": REPORT, "items": tmp_path / "items.jsonl", "full": tmp_path / "full"}
    given |= {"out": tmp_path / "out"} | {path.name: path for path in models_folder.iterdir()}
    return {name: str(path) for name, path in given.items()}


def placed(word: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        word = word.replace(f"{{{name}}}", path)
    return word


def run(words) -> tuple[int, str]:
    """The exit code of a command, and what it printed to stderr."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = list(words)
    program = {TRAINING: train, EVALUATION: measure}.get(words[0])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with in_time():
                if program is None:
                    cli.main()
                with one_line_errors(words[0]):
                    program(words[1:])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, err.getvalue()


HUGE = "9" * 30


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{LINES[18]} --context_length {HUGE}", f"block size {HUGE} is more than any text has"),
        (f"{LINES[15]} --seed 4294967296", "4294967296 is not in 0 to 4294967295"),
        (f"{LINES[15]} --learning_rate nan", "learning_rate is nan; expected a number of at least 0"),
    ],
)
def test_command_lines_that_were_answered_wrongly_once(line, says, places):
    code, said = run([placed(word, places) for word in shlex.split(line)])
    assert code == 2 and says in said.splitlines()[-1]


def test_a_recipe_whose_first_stage_is_refused_leaves_nothing(places, tmp_path):
    (tmp_path / "short.txt").write_text("the cat sat on the mat")
    before = files_in(tmp_path)
    line = "hf_attnswap.training --recipe plain --model_name_or_path {llama} --attention relu"
    given = [*(placed(word, places) for word in shlex.split(line)), "--train_file", str(tmp_path / "short.txt")]
    for tokens in ("64", "128"):  # other stages may have the folder
        code, said = run([*given, "--max_train_tokens", tokens, "--output_dir", str(tmp_path / "run")])
        assert code == 2 and "less than one block of 512" in said.splitlines()[-1]
        assert files_in(tmp_path) == before


@pytest.mark.drawn
@EXAMPLES
def test_command_lines(examples, places, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr("hf_attnswap.publish.push.get_token", lambda: None)  # nothing is pushed from here
    monkeypatch.delenv("ATTNSWAP_DEBUG", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = files_in(tmp_path)

    def clear():
        for path in tmp_path.iterdir():
            if path.name not in ("full", "here", "items.jsonl"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(tmp_path / "here")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")

    def check(line):
        try:
            code, said = run([placed(word, places) for word in line])
        finally:
            torch.set_num_threads(1)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            left = files_in(tmp_path) - before
            clear()
        assert code in (0, 2), (code, said)
        assert not any(".tmp" in name for name, _ in left), left
        if code == 2:
            lines = [each for each in said.splitlines() if each.startswith(f"{line[0]}: ")]
            assert len(lines) == 1 and is_sentence(lines[0]), said
            assert not left, (left, said)

    every(examples, lines(), check)
