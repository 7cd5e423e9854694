"""What the documents say, to be run: their commands and Python, on a tiny model in place of the one that they name."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_attnswap
from hf_attnswap import cli
from hf_attnswap.training import command as training

ROOT = Path(hf_attnswap.__file__).parents[1]
WORDS = [f"Ġ{first}{second}" for first in "abcdefgh" for second in "abcdefgh"]  # for the task that recalls words
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?"
BLOCK = re.compile(r"^```python\n(.+?)^```$|((?:^    [^\n]+\n)+)", re.M | re.S)


def commands(text: str) -> list[str]:
    """The commands of a page: the lines that are indented by four spaces, without comments."""
    return [command for code, lines in BLOCK.findall(text) if not code for command in _lines(lines)]


def python(text: str) -> list[str]:
    """The blocks of Python of a page."""
    return [code for code, _ in BLOCK.findall(text) if code]


def steps(text: str) -> list[str]:
    """Commands and blocks of Python in their order; blocks end with a line break, commands do not."""
    return [step for code, lines in BLOCK.findall(text) for step in ([code] if code else _lines(lines))]


def _lines(block: str) -> list[str]:
    lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines if line]


def run(line: str, monkeypatch) -> None:
    """Run a command in this process; those of other programs, pip and make, are left out."""
    program, *words = shlex.split(line)
    if program == "attnswap":
        with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["attnswap", *words])
            cli.main()
        assert not stop.value.code, line
    elif program == "accelerate":
        assert words[:2] == ["launch", "-m"] and words[2] == "hf_attnswap.training", line
        training.main(words[3:])


def execute(code: str, names: dict) -> str:
    """Run Python in the namespace `names`, and return what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, names)
    return output.getvalue()


def make_inputs(folder: Path) -> Path:
    """Make in `folder` what the documents name: `MODEL`, a tiny model with a tokenizer of letters, and `book.txt`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1 + len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16384, bos_token_id=None, eos_token_id=None,
        initializer_range=0.3,  # so that its attention is not flat
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "MODEL")
    vocabulary = {piece: i for i, piece in enumerate(["?!", *LETTERS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?!").save_pretrained(folder / "MODEL")
    lines = (f"The cat number {i} sat on mat {i % 7}, and the dog saw {i * i} of them." for i in range(4000))
    (folder / "book.txt").write_text("\n\n".join(lines))
    return folder
