"""What the README says runs: its five lines, and every command, on a tiny model in place of the one that it names."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_attnswap
from hf_attnswap import cli
from hf_attnswap.training import command as training

README = (Path(hf_attnswap.__file__).parents[1] / "README.md").read_text()
BLOCKS = [block.strip("\n") for block in re.findall(r"(?:^    .+\n)+", README, re.M)]
COMMANDS = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [re.sub(r"\s{2,}#.*", "", line) for line in COMMANDS]
WORDS = [f"Ġ{first}{second}" for first in "abcdefgh" for second in "abcdefgh"]  # for the task that recalls words
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder to work in: `MODEL`, a tiny model with a tokenizer of letters, and `book.txt`."""
    folder = tmp_path_factory.mktemp("readme")
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1 + len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16384, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "MODEL")
    vocabulary = {piece: i for i, piece in enumerate(["?!", *LETTERS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?!").save_pretrained(folder / "MODEL")
    lines = (f"The cat number {i} sat on mat {i % 7}, and the dog saw {i * i} of them." for i in range(4000))
    (folder / "book.txt").write_text("\n\n".join(lines))
    return folder


def test_the_five_lines_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (lines,) = re.findall(r"```python\n(.+?)```", README, re.S)
    lines, replaced = re.subn(r'"\w+/SmolLM2[^"]*"', repr(str(folder / "MODEL")), lines)
    assert replaced == 1
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(lines, {})
    assert output.getvalue().startswith("The capital of France is")


def test_every_command_is_one_of_these():
    programs = {shlex.split(line)[0] for line in COMMANDS}
    assert programs == {"pip", "make", "attnswap", "accelerate"}


@pytest.mark.long
def test_the_commands_run_in_their_order(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for line in COMMANDS:
        program, *words = shlex.split(line)
        if program == "attnswap":
            words += ["--license", "mit"] if words[0] in ("card", "push") else []
            with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
                patch.setattr("sys.argv", ["attnswap", *words])
                cli.main()
            assert not stop.value.code, f"{line}\n{capsys.readouterr().err}"
        elif program == "accelerate":
            training.main(words[3:])


@pytest.mark.parametrize(
    "page",
    ("README.md", "CONTRIBUTING.md", "docs/findings.md", "benchmarks/results/README.md", "model_cards/README.md"),
)
def test_links_lead_somewhere(page):
    path = Path(hf_attnswap.__file__).parents[1] / page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), f"{page} links to {link}"
