"""The command line: what it prints, its exit codes, and that nothing half-made is left behind."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets  # noqa: F401 (its log must not go to the stderr of one test)
import pytest
import torch
import typer
from attention_cases import NAMES
from command_line import Result
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import hf_attnswap
from hf_attnswap import cli
from hf_attnswap.evaluation.perplexity import perplexity
from hf_attnswap.integration.swapping import describe
from hf_attnswap.sources.lock import alone_in

COMMANDS = typer.main.get_command(cli.app).commands
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,\n"


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory) -> Path:
    """`llama`, a tiny model with a tokenizer of letters, and folders and files that are no such thing."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{c: i + 1 for i, c in enumerate(LETTERS)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    for name, model in (("llama", tiny()), ("converted", hf_attnswap.swap(tiny(), "relu"))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    bloom = AutoConfig.for_model("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=64)
    AutoModelForCausalLM.from_config(bloom).save_pretrained(folder / "bloom")
    tokenizer.save_pretrained(folder / "bloom")
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "half").mkdir()
    for file in (folder / "llama").iterdir():
        (folder / "half" / file.name).write_bytes(file.read_bytes()[: 3000 if file.suffix == ".safetensors" else None])
    (folder / "not.gguf").write_text("not a model")
    (folder / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    (folder / "notes.txt").write_text("not a model")
    return folder


@pytest.fixture
def files(tmp_path, models_folder) -> dict[str, str]:
    """What the arguments of the tests may name."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "damaged.jsonl").write_text("{")
    (tmp_path / "other.jsonl").write_text('{"body": "a b c"}\n')
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"The cat number {i % 7} sat on the mat, and so on." for i in range(60))
    )
    given = {path.stem: str(path) for path in tmp_path.iterdir()} | {"other": str(tmp_path / "other.jsonl")}
    given |= {"empty_text": str(tmp_path / "empty.txt"), "out": str(tmp_path / "out"), "tmp": str(tmp_path)}
    given |= {path.name.replace(".", "_"): str(path) for path in models_folder.iterdir()}
    return given | {"damaged_text": str(tmp_path / "damaged.jsonl")}


def arguments(line: str, files: dict[str, str]) -> list[str]:
    return [part.format(**files) for part in shlex.split(line)]


CONVERT = "convert {llama} --output_dir {out} "
EVALUATE = "evaluate {llama} --validation_file {text} "
TRADEOFF = "tradeoff {llama} --output_dir {full} --train_file {text} "
WRONG = {
    "ls hedghog": "Unknown attention 'hedghog'. Did you mean 'hedgehog'?",
    CONVERT + "--attention hedghog": "Unknown attention 'hedghog'. Did you mean 'hedgehog'?",
    CONVERT + "--attention ''": "Unknown attention ''",
    CONVERT + "--attention window --option windw=8": "window has no option 'windw'. Did you mean 'window'?",
    CONVERT + "--attention window --option window": "option 'window' has no value; expected name=value",
    CONVERT + "--attention window --option window=0": "window: window is 0; expected at least 1",
    CONVERT + "--attention window --option window=many": "window: window is 'many'; expected int",
    CONVERT + "--attention relu_power --option p=3": "relu_power: p is 3; expected one of",
    CONVERT + "--attention relu --option =3": "''",
    CONVERT + "--attention relu --layers 7": "layers has 7, but the model's attention layers are 0 to 2",
    CONVERT + "--attention relu --layers 0,x": "layers has 'x'; expected an index",
    CONVERT + "--attention relu --layers 5:": "layers '5:' selects none of the 3 layers",
    CONVERT + "--attention relu --layers ''": "layers",
    CONVERT + "--dtype float7": "dtype is 'float7'; expected float32",
    CONVERT + "--dtype int8": "int8",
    "convert {tmp}/nowhere --output_dir {out}": "cannot load the model",
    "convert {empty} --output_dir {out}": "has no config.json",
    "convert {damaged} --output_dir {out}": "cannot load the model",
    "convert {half} --output_dir {out}": "cannot load the model",
    "convert {bloom} --output_dir {out}": "cannot be swapped",
    "convert {converted} --output_dir {out}": "already swapped",
    "convert {not_gguf} --output_dir {out}": "is not a GGUF file: it starts with b'not '",
    "convert {cut_gguf} --output_dir {out}": "cannot load the model",
    "convert {tmp}/nowhere.gguf --output_dir {out}": "does not exist",
    "convert {notes_txt} --output_dir {out}": "is a file; expected a Hub id, a folder or a .gguf file",
    "convert {llama} --output_dir {full}": "is not empty: name another one, or empty it",
    "convert {llama} --output_dir {file}": "is a file",
    "convert {llama}": "output_dir",
    "convert --output_dir {out}": "missing",
    CONVERT + "--atention relu": "--atention",
    EVALUATE + "--device cuda": "device 'cuda' is not there",
    EVALUATE + "--device abacus": "device 'abacus' is not there",
    EVALUATE + "--context_length 100000": "less than one block of 100000",
    EVALUATE + "--context_length 0": "context_length",
    EVALUATE + "--context_length 1": "context_length",
    EVALUATE + "--context_length -5": "context_length",
    EVALUATE + "--context_length many": "context_length",
    EVALUATE + "--max_eval_tokens 0": "max_eval_tokens",
    EVALUATE + "--dataset_name wikitext": "either a file or --dataset_name",
    EVALUATE + "--tasks {tmp}/no.jsonl": "does not exist",
    EVALUATE + "--tasks needle --context_length 20": "has no room for its needle",
    EVALUATE + "--context_length 32 --stride 32": "stride is 32; expected less than the context of 32",
    "evaluate {llama}": "either a file or --dataset_name",
    "evaluate {llama} --validation_file {short}": "less than one block of 512",
    "evaluate {llama} --validation_file {tmp}/no.txt": "does not exist",
    "evaluate {llama} --validation_file {empty_text}": "is empty",
    "evaluate {llama} --validation_file {damaged_text}": "cannot read text from",
    "evaluate {llama} --validation_file {other}": "has no column 'text'; it has body",
    "evaluate {llama} --validation_file {file}": "file",
    "evaluate {tmp}/nowhere --validation_file {text}": "cannot load the model",
    "diagnose {llama} --validation_file {text}": "name what to look at: --attention",
    "diagnose {converted} --attention elu --validation_file {text}": "already swapped: leave out --attention",
    "diagnose {llama} --attention hedghog --validation_file {text}": "Did you mean 'hedgehog'?",
    "diagnose {llama} --attention elu": "either a file or --dataset_name",
    "bench {llama} --attention hedghog": "Did you mean 'hedgehog'?",
    "bench {llama} --dtype float7 --attention elu": "float7",
    "bench {llama} --device cuda --attention elu": "device 'cuda' is not there",
    "bench {llama} --length 0 --attention elu --rounds 1": "length",
    "bench {llama} --threads -1 --attention elu": "threads",
    "bench {bloom}": "cannot be swapped",
    "bench {not_gguf}": "is not a GGUF file",
    "inspect {tmp}/nowhere": "cannot read the model",
    "inspect {empty}": "has no config.json",
    "inspect {not_gguf}": "is not a GGUF file",
    "tradeoff {llama} --output_dir {out} --train_file {text} --arm hedghog": "Did you mean 'hedgehog'?",
    "tradeoff {llama} --output_dir {out} --train_file {text} --arm relu_power:q=3": "relu_power has no option 'q'",
    "tradeoff {llama} --output_dir {out} --train_file {text} --arm relu_power:p": "option 'p' has no value",
    "tradeoff {llama} --output_dir {out} --train_file {short}": "give more text or",
    TRADEOFF + "--context_length 32 --block_size 32 --length 32": "is not empty",
    "tradeoff {llama} --output_dir {out} --train_file {text} --learning_rate 0": "learning_rate is 0.0; expected a",
    "tradeoff {llama} --output_dir {out} --train_file {text} --learning_rate nan": "learning_rate is nan; expected a",
    "tradeoff {llama} --output_dir {out} --train_file {text} --seed 4294967296": "seed",
    "tradeoff {llama} --output_dir {out}": "either a file or --dataset_name",
    "nonsense": "nonsense",
    "ls --jsn": "--jsn",
}  # fmt: skip
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")


@pytest.mark.parametrize(
    ("line", "says"),
    [pytest.param(line, says, marks=NEEDS_NO_GPU if "cuda" in line else ()) for line, says in WRONG.items()],
)
def test_wrong_use_is_one_line_and_leaves_nothing(attnswap, files, line, says):
    before = sorted(Path(files["tmp"]).rglob("*"))
    result = attnswap(*arguments(line, files))
    assert result.err.startswith("attnswap: ") and len(result.err.splitlines()) == 1, result.err
    assert says.lower() in result.err.lower()
    assert result.out == ""
    assert result.code == 2
    assert sorted(Path(files["tmp"]).rglob("*")) == before
    assert Path(files["full"], "mine").read_text() == Path(files["file"]).read_text() == "keep"


def test_no_command_shows_the_help(attnswap):
    result = attnswap()
    assert result.code == 2
    assert all(name in result.out + result.err for name in COMMANDS)


def test_debug_shows_the_traceback(attnswap, files, monkeypatch):
    monkeypatch.setenv("ATTNSWAP_DEBUG", "1")
    result = attnswap(*arguments(CONVERT + "--attention hedghog", files))
    assert result.code == 2
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1].startswith("attnswap: Unknown attention 'hedghog'")


def fails(*args, **kwargs):
    raise OSError("no space left on the device\nand more")


def test_failure_is_one_line_and_leaves_nothing(attnswap, files, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fails)
    result = attnswap(*arguments(CONVERT + "--attention relu", files))
    assert result == Result(1, "", "attnswap: no space left on the device")
    assert not Path(files["out"]).exists() and not list(Path(files["tmp"]).glob(".*"))


def test_debug_shows_the_traceback_of_a_failure(files, monkeypatch, capsys):
    monkeypatch.setenv("ATTNSWAP_DEBUG", "1")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)
    monkeypatch.setattr(sys, "argv", ["attnswap", *arguments(CONVERT + "--attention relu", files)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" in printed and "OSError" in printed
    assert not Path(files["out"]).exists() and not list(Path(files["tmp"]).glob(".*"))


def test_interrupted(attnswap, files, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupt)
    result = attnswap(*arguments(CONVERT + "--attention relu", files))
    assert result.code == 130 and result.err.startswith("attnswap: interrupted")
    assert not Path(files["out"]).exists() and not list(Path(files["tmp"]).glob(".*"))


def test_ls(attnswap):
    result = attnswap("ls")
    assert result.code == 0 and result.err == ""
    assert all(name in result.out for name in NAMES)
    entries = json.loads(attnswap("ls", "--json").out)
    assert [entry["name"] for entry in entries] == NAMES
    for entry in entries:
        assert set(entry) >= {
            "formula",
            "cost",
            "cost_class",
            "source",
            "options",
            "masks",
            "kinds",
            "state",
            "parameters",
        }
    window = next(entry for entry in entries if entry["name"] == "window")
    assert window["options"]["window"]["default"] == 64


def test_ls_takes_one_line_of_80_columns_per_variant(attnswap, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = attnswap("ls").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.split()[:1] == [name] for line in lines for name in NAMES) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_ls_tells_all_about_one(attnswap, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    entry = json.loads(attnswap("ls", name, "--json").out)
    told = attnswap("ls", name).out
    for key in ("name", "says", "formula", "cost", "source"):
        assert entry[key] in told
    for key in ("options", "parameters"):
        assert all(word in told for word in entry[key])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(attnswap, command):
    result = attnswap(command, "--help")
    assert result.code == 0 and result.err == ""
    found = re.search(r"Example: attnswap ((?:.+\n?)+)", result.out)
    assert found, result.out
    words = shlex.split(found[1])
    assert words[0] == command
    assert COMMANDS[command].make_context(command, words[1:]).params


@pytest.mark.parametrize("model", ("llama", "converted"))
def test_inspect(attnswap, files, model):
    found = json.loads(attnswap("inspect", files[model], "--json").out)
    assert [entry["layer"] for entry in found] == [0, 1, 2]
    assert {entry["swapped"] for entry in found} == {"relu" if model == "converted" else None}
    assert {entry["reason"] for entry in found} == {None}
    assert "LlamaAttention" in attnswap("inspect", files[model]).out


def test_inspect_says_how_far_layers_see(attnswap, tmp_path):
    MistralConfig(num_hidden_layers=2, sliding_window=6, architectures=["MistralForCausalLM"]).save_pretrained(tmp_path)
    assert [entry["sliding_window"] for entry in json.loads(attnswap("inspect", tmp_path, "--json").out)] == [6, 6]
    assert "last 6" in " ".join(attnswap("inspect", tmp_path).out.split())


def test_inspect_says_why_not(attnswap, files):
    result = attnswap("inspect", files["bloom"])
    assert result.code == 0 and "no: " in result.out


def test_convert_an_encoder(attnswap, tmp_path):
    bert = AutoConfig.for_model("bert", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    model = BertForSequenceClassification(bert)
    model.save_pretrained(tmp_path / "bert")
    result = attnswap(
        "convert", str(tmp_path / "bert"), "--attention", "elu", "--layers", "1", "--output_dir", str(tmp_path / "elu")
    )
    assert result == Result(
        0, f"{tmp_path / 'elu'}: elu in 1 bidirectional layers, not trained; it has no tokenizer\n", ""
    )
    again = BertForSequenceClassification.from_pretrained(tmp_path / "elu")
    assert [entry.swapped for entry in hf_attnswap.inspect(again)] == [None, "elu"]
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    result = attnswap(
        "convert", str(tmp_path / "bert"), "--attention", "elu", "--kind", "cross", "--output_dir", str(tmp_path / "x")
    )
    assert result.code == 2 and "has no cross attention, only bidirectional" in result.err


def test_convert_and_evaluate(attnswap, files):
    line = CONVERT + "--attention relu_power --option p=2 --option shift=none --layers 1::2"
    result = attnswap(*arguments(line, files))
    assert result == Result(0, f"{files['out']}: relu_power in 1 layers, not trained\n", "")
    assert not list(Path(files["tmp"]).glob(".*"))
    model = AutoModelForCausalLM.from_pretrained(files["out"])
    assert model.config.attnswap["swapped"] == [
        {
            "attention": "relu_power",
            "options": {"gain": False, "p": 2, "shift": "none", "temperature": False},
            "kind": "causal",
            "layers": [1],
        }
    ]
    line = (
        "evaluate {out} --validation_file {text} --context_length 32 --context_length 64 --max_eval_tokens 512 --json"
    )
    result = attnswap(*arguments(line, files))
    assert result.code == 0 and result.err == ""
    short, long = json.loads(result.out)["perplexity"]
    assert (short["context"], short["tokens"]) == (32, 16 * 31) and (long["context"], long["tokens"]) == (64, 8 * 63)
    text = Path(files["text"]).read_text()
    ids = torch.tensor([[LETTERS.find(c) + 1 for c in text]])[:, :512]
    for row in (short, long):
        with torch.no_grad():
            blocks = ids.view(-1, row["context"])
            expected = torch.nn.functional.cross_entropy(
                model(blocks).logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()
            )
        assert row["nll"] == pytest.approx(expected.item(), rel=1e-4)
        assert row["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-3)
        assert row["standard_error"] > 0
    table = attnswap(*arguments(line.removesuffix(" --json"), files)).out
    assert "relu_power in 1 layers" in table and f"{short['perplexity']:.4g}" in table


def test_evaluate_an_unswapped_model(attnswap, files):
    line = EVALUATE + "--context_length 64 --max_eval_tokens 256 --json"
    (row,) = json.loads(attnswap(*arguments(line, files)).out)["perplexity"]
    text = Path(files["text"]).read_text()
    ids = torch.tensor([LETTERS.find(c) + 1 for c in text])[:256]
    assert row["perplexity"] == pytest.approx(perplexity(tiny(), ids, 64).perplexity, rel=1e-5)


def test_evaluate_by_word_byte_and_position(attnswap, files):
    line = EVALUATE + "--context_length 64 --max_eval_tokens 256 --json"
    (row,) = json.loads(attnswap(*arguments(line, files)).out)["perplexity"]
    assert row["tokens"] == 4 * 63
    assert row["bytes"] == 4 * 2 * 63  # this tokenizer puts a space between any two letters
    assert row["byte_perplexity"] == pytest.approx(row["perplexity"] ** 0.5)
    assert row["word_perplexity"] == pytest.approx(row["perplexity"] ** (row["tokens"] / row["words"]))
    assert [(p["first"], p["last"]) for p in row["by_position"]][-2:] == [(16, 31), (32, 63)]
    weights = [p["last"] - p["first"] + 1 for p in row["by_position"]]
    total = sum(p["nll"] * w for p, w in zip(row["by_position"], weights, strict=True))
    assert total / 63 == pytest.approx(row["nll"], rel=1e-5)
    (row,) = json.loads(attnswap(*arguments(line + " --stride 16", files)).out)["perplexity"]
    assert (row["stride"], row["tokens"], row["by_position"]) == (16, 15 * 16, [])
    assert "beyond" not in attnswap(*arguments(EVALUATE + "--context_length 64", files)).out
    assert "beyond the 512 of its config" in attnswap(*arguments(EVALUATE + "--context_length 600", files)).out


def test_diagnose(attnswap, files, tmp_path):
    line = "diagnose {llama} --attention relu --attention relu_power:p=8 --validation_file {text} --context_length 32"
    result = attnswap(*arguments(line + " --output_file {out}.json --json", files))
    assert result.code == 0 and result.err == ""
    relu, power = json.loads(result.out)
    assert json.loads(Path(f"{files['out']}.json").read_text())["arms"] == [relu, power]
    assert (relu["label"], power["label"]) == ("relu", "relu_power:p=8") and relu["tokens"] == 64
    assert len(relu["layers"]) == 3 and relu["layers"][0]["dead"] > power["layers"][0]["dead"]
    assert relu["perplexity"] == pytest.approx(power["perplexity"])
    table = attnswap(*arguments("diagnose {converted} --validation_file {text} --context_length 32", files)).out
    assert "relu in 3 layers" in " ".join(table.split()) and "grad q" in table and re.search(r"│ +2 │", table)
    assert "…" not in table and max(map(len, table.splitlines())) <= 80
    (chosen,) = re.findall(r"Half of them: (--layers [0-9,]+)", table)
    assert attnswap(*arguments("convert {llama} --attention relu --output_dir {out} " + chosen, files)).code == 0
    assert describe(AutoModelForCausalLM.from_pretrained(files["out"])) == "relu in 2 layers"


def test_evaluate_beside_a_control_on_the_same_items(attnswap, files, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": "The", "choices": ["cat", "mat"], "answer": i % 2}) + "\n" for i in range(6))
    )
    line = "evaluate {converted} --control {llama} --validation_file {text} --context_length 64 --max_eval_tokens 256 "
    line += f"--tasks {pairs},writing --limit 4"
    found = json.loads(attnswap(*arguments(line + " --json", files)).out)
    (row,), text = found["perplexity"], Path(files["text"]).read_text()
    ids = torch.tensor([LETTERS.find(c) + 1 for c in text])[:256]
    assert row["ratio"]["value"] == pytest.approx(row["perplexity"] / perplexity(tiny(), ids, 64).perplexity, rel=1e-4)
    assert row["ratio"]["items"] == 4 and row["ratio"]["few"] and row["verdict"] == row["ratio"]["verdict"]
    tasks = {task["metric"]: task for task in found["tasks"]}
    assert (
        tasks["acc"]["items"] == 4
        and tasks["acc"]["difference"]["value"] == tasks["acc"]["value"] - tasks["acc"]["control"]
    )
    writing = tasks["tokens as the control's"]
    assert writing["items"] == 4 and 0 <= writing["value"] < writing["control"] == 1
    table = attnswap(*arguments(line, files)).out
    assert row["verdict"] is None and "ratio to control" in table and "fewer than 500" in table
    assert "no interval: it needs 8 blocks or items of a task" in table
    same = json.loads(attnswap(*arguments(line.replace("{converted}", "{llama}") + " --json", files)).out)
    assert same["perplexity"][0]["ratio"]["value"] == 1
    agreement = {task["metric"]: task["value"] for task in same["tasks"] if task["task"] == "writing"}
    assert agreement["tokens as the control's"] == agreement["agreement when told the control's"] == 1


def test_convert_into_an_empty_folder(attnswap, files):
    Path(files["out"]).mkdir()
    assert attnswap(*arguments(CONVERT + "--attention softmax", files)).code == 0
    assert Path(files["out"], "config.json").is_file() and Path(files["out"], "tokenizer.json").is_file()


def test_a_comparison_in_a_folder_in_which_another_one_runs(attnswap, files):
    with alone_in(Path(files["out"])):
        found = attnswap(*arguments("tradeoff {llama} --output_dir {out} --train_file {text}", files))
    assert found.code == 2 and f"is in use by process {os.getpid()} on" in found.err


def test_convert_and_evaluate_a_trained_model(attnswap, stories260k, tmp_path):
    """Close to softmax at p = 16, and far from it where nothing is attended to."""
    story = "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her dog. "
    text = tmp_path / "text.txt"
    text.write_text(story * 20)
    found = {}
    for name in ("softmax", "relu_power", "none"):
        assert attnswap("convert", stories260k, "--attention", name, "--output_dir", tmp_path / name).code == 0
        result = attnswap("evaluate", tmp_path / name, "--validation_file", text, "--context_length", 64, "--json")
        (found[name],) = (row["perplexity"] for row in json.loads(result.out)["perplexity"])
    assert found["relu_power"] == pytest.approx(found["softmax"], rel=0.2)
    assert found["none"] > 3 * found["softmax"]


def test_as_a_module(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "hf_attnswap", "convert", "nowhere/at-all", "--output_dir", "out"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(hf_attnswap.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("attnswap: cannot load the model 'nowhere/at-all'") and run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
