"""Stages as processes: killed and resumed, several at a time, and what they say when they stop."""

import json
import os
import random
import signal
import socket
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_fixtures import LAUNCH, finish, forked

from hf_attnswap.evaluation import __main__ as evaluation
from hf_attnswap.training import shards
from hf_attnswap.training.command import main

CONFIGS = "examples/configs"
MODULE = "hf_attnswap.training"
SWAP = ["--attention", "hedgehog+window", "--option", "window=4", "--option", "sinks=1"]

# Runs a module under FSDP2 without a GPU, which accelerate takes FSDP for: it is made to take gloo for a GPU.
FSDP_ON_CPU = """
import runpy, sys, torch
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
torch.accelerator.is_available = lambda: True
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def command(checkpoint, text):
    def build(name, output_dir, *more):
        given = dict(model_name_or_path=checkpoint, train_file=text, output_dir=output_dir, block_size=32)
        options = [part for option, value in given.items() for part in (f"--{option}", value)]
        return ["-m", MODULE, name, *options, *SWAP, *more]

    return build


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "training_log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    assert weights(a).keys() == weights(b).keys()
    assert all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


def kill_at_random(started, folder, seconds):
    """SIGKILL some time after the next step that the run logs."""
    log = folder / "training_log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while started.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
        time.sleep(0.002)
    time.sleep(seconds)
    started.send_signal(signal.SIGKILL)
    started.communicate()


def torn(arguments, nth):
    """Train, but write half a file and kill this process the nth time that tensors are saved: twice in a checkpoint."""
    calls, save = [], shards.save_file

    def half(tensors, file, metadata=None):
        calls.append(file)
        if len(calls) == nth:
            with open(file, "wb") as stream:
                stream.write(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, file, metadata=metadata)

    shards.save_file = half
    main(arguments)


def test_killed_in_a_checkpoint_and_once_more_a_run_ends_as_if_nothing_had_happened(command, train, tmp_path, capsys):
    more = ["--max_train_steps", "24", "--checkpointing_steps", "2"]
    train("align", command("align", tmp_path / "whole", *more)[3:])
    killed = list(map(str, command("align", tmp_path / "killed", *more, "--resume_from_checkpoint", "latest")[2:]))
    assert forked(torn, (killed, 4)) == [-signal.SIGKILL]
    assert {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()} == {"step_2", "partial_4"}
    assert forked(torn, (killed, random.randint(3, 20))) == [-signal.SIGKILL]
    assert not (tmp_path / "killed" / "model").exists()
    train("align", killed[1:])
    assert "going on from" in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.long
@pytest.mark.parametrize("name", ["align", "finetune"])
def test_killed_at_many_moments(process, command, tmp_path, name):
    more = ["--max_train_steps", "80", "--checkpointing_steps", "1"]
    finish(process(*command(name, tmp_path / "whole", *more)))
    killed = command(name, tmp_path / "killed", *more, "--resume_from_checkpoint", "latest")
    for _ in range(8):
        kill_at_random(process(*killed), tmp_path / "killed", random.random() / 4)
        if (tmp_path / "killed" / "model").exists():
            break
    else:
        finish(process(*killed))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.long
def test_two_processes_align_as_one_that_accumulates(process, command, train, tmp_path):
    """Alignment divides by the variance of a batch, so a batch of two is near two batches of one, not the same."""
    more = ["--max_train_steps", "6", "--checkpointing_steps", "6"]
    finish(process(*LAUNCH, "--config_file", f"{CONFIGS}/multi_cpu.yaml", *command("align", tmp_path / "two", *more)))
    for folder, option in (
        ("accumulated", "--gradient_accumulation_steps"),
        ("batch", "--per_device_train_batch_size"),
    ):
        train("align", command("align", tmp_path / folder, *more, option, 2)[3:])
    two = losses(tmp_path / "two")
    assert len(two) == 6 and two == pytest.approx(losses(tmp_path / "accumulated"), rel=1e-5)
    assert two == pytest.approx(losses(tmp_path / "batch"), rel=1e-4)
    files = {path.name for path in (tmp_path / "two" / "checkpoints" / "step_6").iterdir()}
    assert {"process_0.json", "process_1.json"} <= files


def one_of_two(rank, port, arguments):
    """Train as one of the two processes that torchrun starts."""
    os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    AcceleratorState._reset_state(reset_partial_state=True)
    main(arguments)


@pytest.mark.parametrize("start", ("forked", pytest.param("launched", marks=pytest.mark.long)))
def test_two_processes_finetune_as_one_with_larger_batches(process, command, train, tmp_path, start):
    more = ["--max_train_steps", "6", "--learning_rate", "1e-3"]
    given = command("finetune", tmp_path / "two", *more)
    if start == "launched":
        finish(process(*LAUNCH, "--config_file", f"{CONFIGS}/multi_cpu.yaml", *given))
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        assert forked(one_of_two, *((rank, port, list(map(str, given[2:]))) for rank in "01")) == [0, 0]
    for folder, option in (
        ("accumulated", "--gradient_accumulation_steps"),
        ("batch", "--per_device_train_batch_size"),
    ):
        train("finetune", command("finetune", tmp_path / folder, *more, option, 2)[3:])
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / folder), rel=1e-5)
        ours, other = weights(tmp_path / "two"), weights(tmp_path / folder)
        assert all(torch.allclose(ours[name], other[name], atol=1e-5) for name in ours)


@pytest.mark.long
def test_two_processes_distil_as_one_with_larger_batches(process, command, train, tmp_path):
    """With LoRA, where the model of each process is its own teacher."""
    more = ["--max_train_steps", "4", "--learning_rate", "1e-3", "--use_lora", "--hidden_weight", "1"]
    finish(process(*LAUNCH, "--config_file", f"{CONFIGS}/multi_cpu.yaml", *command("distill", tmp_path / "two", *more)))
    for folder, option in (
        ("accumulated", "--gradient_accumulation_steps"),
        ("batch", "--per_device_train_batch_size"),
    ):
        train("distill", command("distill", tmp_path / folder, *more, option, 2)[3:])
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / folder), rel=1e-4)


@pytest.mark.long
def test_two_processes_measure_the_same_perplexity_as_one(process, _fresh_accelerator, checkpoint, text, tmp_path):
    given = ["--model_name_or_path", checkpoint, "--validation_file", text, "--max_eval_tokens", "510"]
    given += ["--context_length", "32", "--context_length", "300", "--output_file"]
    out, _ = finish(
        process(
            *LAUNCH,
            "--config_file",
            f"{CONFIGS}/multi_cpu.yaml",
            "-m",
            "hf_attnswap.evaluation",
            *given,
            tmp_path / "two",
        )
    )
    evaluation.main([*given, str(tmp_path / "one")])
    assert json.loads((tmp_path / "two").read_text()) == json.loads((tmp_path / "one").read_text())
    assert out.count("perplexity") == 1


@pytest.mark.long
def test_asking_for_two_processes_and_getting_one_stops(process, command, tmp_path):
    launch = [*LAUNCH, "-q", "--cpu", "--num_processes", "2"]
    _, err = finish(process(*launch, *command("finetune", tmp_path / "out", "--max_train_steps", "1")), code=1)
    assert "hf_attnswap.training: the launcher was asked for several processes, and this runs as 1" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_failure_under_the_launcher_is_one_line_and_an_exit_code(process, command, tmp_path):
    given = command("finetune", tmp_path / "nan", "--max_train_steps", "4", "--learning_rate", "1e38")
    _, err = finish(process(*LAUNCH, "-q", "--config_file", f"{CONFIGS}/cpu.yaml", *given), code=1)
    assert (
        "hf_attnswap.training: the loss is nan at step 2: lower the learning rate (inf)" in err
        and "Traceback" not in err
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_fsdp2_trains_and_resumes_as_one_process(process, command, tmp_path, name):
    """The code that fsdp2.yaml reaches, over gloo."""
    driver = tmp_path / "driver.py"
    driver.write_text(FSDP_ON_CPU)
    launch = [*LAUNCH, "--config_file", f"{CONFIGS}/fsdp2.yaml", "--mixed_precision", "no", driver]
    more = ["--max_train_steps", "6", "--learning_rate", "1e-3", "--checkpointing_steps", "4"]
    more += ["--new_parameters_learning_rate", "3e-3"]
    finish(process(*command(name, tmp_path / "one", *more, "--gradient_accumulation_steps", 2)))
    finish(process(*launch, *command(name, tmp_path / "two", *more)[1:]))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    ours, other = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.allclose(ours[name], other[name], atol=1e-5) for name in other)
    resumed = command(name, tmp_path / "resumed", *more)
    checkpoint = tmp_path / "two" / "checkpoints" / "step_4"
    finish(process(*launch, *resumed[1:], "--resume_from_checkpoint", checkpoint))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "two")[4:]
    resumed = weights(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in ours.items())
    assert {path.suffix for path in checkpoint.rglob("*")} == {".json", ".safetensors"}
    more += ["--gradient_accumulation_steps", 2, "--resume_from_checkpoint", checkpoint]
    finish(process(*command(name, tmp_path / "alone", *more)))  # the parts, put together in one process
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "two")[4:], rel=1e-5)
