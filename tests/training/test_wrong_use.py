"""Stages in this process: what they refuse, launches not as asked, trackers, errors in one line."""

import json
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType

from hf_attnswap import UsageError
from hf_attnswap.errors import one_line_errors
from hf_attnswap.launch import require_whole_weights
from hf_attnswap.sources.lock import alone_in


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("align", ["--attention", "relu"], "no parameters to align"),
        ("align", ["--use_lora"], "--use_lora is for the projections"),
        ("align", ["--train", "attention", "--linear_branch_alone"], "compares no whole attention modules"),
        (
            "align",
            ["--attention", "relu_norm", "--train", "attention", "--weights_loss", "1"],
            "compares weights on the same queries",
        ),
        ("align", ["--attention", "delta", "--weights_loss", "1"], "delta has negative weights"),
        ("align", ["--attention", "elu", "--linear_branch_alone"], "has no linear branch beside a window"),
        ("align", ["--attention", "hedghog"], "Did you mean 'hedgehog'"),
        ("align", ["--option", "window"], "expected name=value"),
        ("finetune", ["--layers", "1::2"], "--layers belong to --attention, which is missing"),
        ("finetune", ["--model_name_or_path", "nowhere"], "cannot load the model 'nowhere'"),
        ("finetune", ["--train_file", "nowhere.txt"], "text file 'nowhere.txt' does not exist"),
        ("finetune", ["--block_size", "100000"], "less than one block of 100000"),
        ("finetune", ["--text_column", "body"], "has no column 'body'"),
        ("finetune", ["--resume_from_checkpoint", "nowhere"], "is not a checkpoint of this package"),
    ],
)
def test_wrong_use(train, arguments, tmp_path, name, more, message):
    with pytest.raises(UsageError, match=message):
        train(name, [*arguments, *more])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_not_empty(train, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").touch()
    with pytest.raises(UsageError, match="is not empty"):
        train("finetune", arguments)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max_train_steps", "0"], "0 is not positive"),
        (["--max_train_tokens", "100"], "give either --max_train_steps or --max_train_tokens, not both"),
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--learning_rate", "nan"], "learning_rate is nan; expected a number of at least 0"),
        (["--weight_decay", "inf"], "weight_decay is inf; expected a number of at least 0"),
        (["--num_warmup_steps", "-1"], "num_warmup_steps is -1; expected"),
        (
            ["--learning_rate", "0", "--final_learning_rate", "1e-5"],
            "final_learning_rate is 1e-05, where",
        ),
        (["--lora_dropout", "1"], "1.0 is not in 0 to below 1"),
        (["--seed", "-1"], "-1 is not in 0 to 4294967295"),
        (["--seed", "4294967296"], "4294967296 is not in 0 to"),
        (["--block_size", "9" * 30], "is more than any text has"),
        (["--dataset_name", "wikitext"], "give either --train_file or --dataset_name, not both"),
    ],
)
def test_wrong_arguments(train, arguments, more, message):
    with pytest.raises(UsageError, match=message):
        train("finetune", [*arguments, *more])


def test_a_tracker_that_is_not_installed(train, arguments):
    missing = [t for t in LoggerType.list() if t != "all" and t not in map(str, get_available_trackers())]
    with pytest.raises(UsageError, match=f"report_to is '{missing[0]}', but no such tracker is installed"):
        train("finetune", [*arguments, "--with_tracking", "--report_to", missing[0]])


def test_a_tracker_gets_the_loss_of_each_step(train, arguments, tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    train("finetune", [*arguments, "--with_tracking", "--report_to", "tensorboard"])
    read = events.EventAccumulator(str(tmp_path / "out" / "hf_attnswap"))
    read.Reload()
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert [event.step for event in read.Scalars("loss")] == [entry["step"] for entry in log]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx([entry["loss"] for entry in log])


def test_trackio_gets_the_loss_of_each_step(train, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    train("finetune", [*arguments, "--with_tracking", "--report_to", "trackio"])
    with closing(sqlite3.connect(tmp_path / "trackio" / "hf_attnswap.db")) as kept:
        rows = kept.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert [step for step, _ in rows] == [entry["step"] for entry in log]
    assert [json.loads(told)["loss"] for _, told in rows] == pytest.approx([entry["loss"] for entry in log])


def test_a_launch_that_starts_fewer_processes_than_asked_stops(train, arguments, monkeypatch, tmp_path):
    """The environment of a process that `accelerate launch --cpu --num_processes 2` starts alone."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    train("finetune", [*arguments, "--output_dir", str(tmp_path / "one")])  # one was asked for
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="asked for several processes, and this runs as 1"):
        train("finetune", arguments)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_is_not_of_the_kind_that_was_asked_stops(train, arguments, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises((UsageError, ImportError), match=f"asked for {kind}|DeepSpeed is not installed"):
        train("finetune", arguments)


def test_a_launch_by_zero_3_stops():
    """Which leaves variants without their weights; `test_deepspeed.py` has the other stages."""
    launched = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace())
    for stage in (0, 1, 2):
        launched.state.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
        require_whole_weights(launched)
    launched.state.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(UsageError, match="zero_stage 3, .*: set zero_stage: 2, or shard the weights by FSDP2"):
        require_whole_weights(launched)


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_a_launch_that_cuts_heads_or_texts_stops(train, arguments, monkeypatch, kind):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "2")
    with pytest.raises(UsageError, match=f"asked for {kind}_size 2.*leave {kind}_size at 1"):
        train("finetune", arguments)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UsageError("no such thing\nsecond line"), 2, "program: no such thing\n"),
        (RuntimeError("it broke"), 1, "program: it broke\n"),
        (ValueError(), 1, "program: ValueError()\n"),
        (KeyboardInterrupt(), 130, "program: interrupted\n"),
    ],
)
def test_one_line_and_an_exit_code_for_each_kind_of_error(error, code, line, capsys, monkeypatch):
    monkeypatch.delenv("ATTNSWAP_DEBUG", raising=False)
    with pytest.raises(SystemExit) as exit, one_line_errors("program"):
        raise error
    assert (exit.value.code, capsys.readouterr().err) == (code, line)
    monkeypatch.setenv("ATTNSWAP_DEBUG", "1")
    with pytest.raises(SystemExit), one_line_errors("program"):
        raise error
    assert "Traceback" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_its_step(train, arguments):
    with pytest.raises(FloatingPointError, match="at step [2-4]: lower the learning rate"):
        train("finetune", [*arguments, "--learning_rate", "1e38"])


@pytest.mark.parametrize("recipe", [False, True])
def test_a_folder_in_which_another_process_trains(train, arguments, tmp_path, recipe):
    """Whether it starts anew or goes on; only the folder itself is taken, not those beside it."""
    at = arguments.index("--output_dir")
    arguments = arguments[:at] + arguments[at + 2 :]
    command = ["finetune"]
    if recipe:
        arguments[arguments.index("--max_train_steps")] = "--max_train_tokens"
        command = ["--recipe", "plain", "--attention", "relu_norm"]
    with alone_in(tmp_path / "out"):
        for more in ([], [] if recipe else ["--resume_from_checkpoint", "latest"]):
            with pytest.raises(UsageError, match="in use by process"):
                train(command[0], [*command[1:], *arguments, *more, "--output_dir", tmp_path / "out"])
    assert not (tmp_path / "out").exists()
