"""Fixtures: a tiny checkpoint with a tokenizer, a text, and programs in this process or as processes."""

import importlib
import multiprocessing
import os
import string
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_attnswap.training.command import main

ROOT = Path(__file__).parents[1]
LAUNCH = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As the processes that the tests start: their numbers are compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are letters."""
    vocabulary = {letter: i for i, letter in enumerate(["?", "Ġ", "Ċ", *string.ascii_letters, *".,:`'()"])}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory, letters):
    """`save_tiny("gpt2")` is the folder of a tiny model with that tokenizer."""

    def save(family: str, **config) -> str:
        folder = tmp_path_factory.mktemp(family)
        tiny(family, **config).save_pretrained(folder)
        letters.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def checkpoint(save_tiny) -> str:
    return save_tiny("llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics.values())[:6000])
    return str(path)


@pytest.fixture
def arguments(checkpoint, text, tmp_path):
    """The command line of a short run; later options win."""
    given = dict(
        model_name_or_path=checkpoint, train_file=text, output_dir=tmp_path / "out", block_size=32, max_train_steps=4
    )
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(_fresh_accelerator):
    """`train("align", arguments)` runs a stage in this process; `train("--recipe", arguments)` a recipe."""

    def run(name, arguments):
        main([name, *map(str, arguments)])

    return run


@pytest.fixture
def script(_fresh_accelerator, monkeypatch):
    """`script("benchmarks/classify")` is that script as a module; `.main([...])` runs it in this process."""
    before = set(sys.modules)

    def load(path):
        folder, _, name = path.rpartition("/")
        monkeypatch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(
            (str(ROOT / "benchmarks"), str(ROOT / "examples"))
        ):
            del sys.modules[name]


@pytest.fixture(scope="session")
def process():
    """`process("-m", "accelerate.commands.launch", ...)` starts Python in the repository's root, one thread each."""

    def start(*arguments) -> subprocess.Popen:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def forked(run, *calls, timeout=300):
    """Call `run` with each of these arguments, each in a process that has what the tests have imported; exit codes."""
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=run, args=arguments) for arguments in calls]
    for child in started:
        child.start()
    for child in started:
        child.join(timeout)
        child.kill()
        child.join()
    return [child.exitcode for child in started]


def finish(started, code=0):
    """Wait for a process, and return what it printed."""
    out, err = started.communicate(timeout=300)
    assert started.returncode == code, err
    return out, err
