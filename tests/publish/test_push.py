"""Publishing end to end, against a double of the Hub on this machine. Real rights, Xet and quotas are not in it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_attnswap
from hf_attnswap import UsageError, cli
from hf_attnswap.publish.push import prepare, push

ORIGIN = dict(base_model="org/base", licence="apache-2.0")
REPO = "user/converted"


def push_whole(folder: Path, repo_id: str = REPO, **to) -> str:
    return push(prepare(folder, repo_id, **ORIGIN), repo_id, **to)


def environment(hub, tmp_path, **changed) -> dict[str, str]:
    """For a process of its own."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = str(Path(hf_attnswap.__file__).parents[1])
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": root}
    return keep | own | changed


LOAD = """
import json, sys, torch
import hf_attnswap
from transformers import AutoModelForCausalLM, pipeline
ids, expected = torch.load(sys.argv[1])
model, info = AutoModelForCausalLM.from_pretrained("user/converted", output_loading_info=True)
with torch.no_grad():
    off = (model(ids).logits - expected).abs().max().item()
text = pipeline("text-generation", "user/converted")("the cat sat on", max_new_tokens=8, do_sample=False)
swapped = [entry.swapped for entry in hf_attnswap.inspect(model)]
print("FOUND" + json.dumps({"off": off, "keys": sum(map(len, info.values())), "text": text, "swapped": swapped}))
"""


def test_pushed_here_and_loaded_by_id_in_another_process(here, attnswap, conversion, tmp_path):
    run = attnswap("push", conversion, REPO, "--json", "--base_model", "org/base", "--license", "apache-2.0")
    assert run.code == 0, run.err
    said = json.loads(run.out)
    sha, files = here.repos[REPO].at("main")
    assert said["url"] == f"{here.url}/{REPO}/commit/{sha}"
    assert set(said["files"]) == set(files) - {".gitattributes"} >= {"README.md", "config.json", "tokenizer.json"}
    assert all(len(files[name]) == size for name, size in said["files"].items())
    assert len(here.uploads()) == len(list(conversion.glob("*.safetensors"))) > 3

    loading = [sys.executable, "-c", LOAD, str(conversion.parent / "logits.pt")]
    run = subprocess.run(
        loading, capture_output=True, text=True, env=environment(here, tmp_path / "other"), timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("FOUND")[1])
    assert found["off"] < 1e-4 and found["keys"] == 0 and found["swapped"] == ["hedgehog+window"] * 3
    here = pipeline("text-generation", str(conversion))("the cat sat on", max_new_tokens=8, do_sample=False)
    assert found["text"] == here


@pytest.mark.long
def test_an_interrupted_upload_continues(here, conversion, tmp_path):
    here.hang_after = 3
    code = "from test_push import *; push_whole(Path(sys.argv[1]))"
    path = os.pathsep.join([str(Path(hf_attnswap.__file__).parents[1]), str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(conversion)],
        env=environment(here, tmp_path, HF_TOKEN="hf_writer", PYTHONPATH=path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert here.hanging.wait(200)
    finally:
        process.kill()
        process.wait()
    time.sleep(0.1)
    arrived = set(here.objects)
    assert len(arrived) == 3 and "config.json" not in here.repos[REPO].at("main")[1]
    here.hang_after, here.log = None, []
    push_whole(conversion)
    assert len(here.uploads()) == len(list(conversion.glob("*.safetensors"))) - 3
    assert arrived.isdisjoint(here.uploads())
    files = here.repos[REPO].at("main")[1]
    assert all(files[path.name] == path.read_bytes() for path in conversion.iterdir())
    here.log.clear()
    push_whole(conversion)
    assert not here.uploads() and not any("/commit/" in path for _, path, _ in here.log)


def test_private_repositories_branches_and_pull_requests(here, conversion, monkeypatch):
    push_whole(conversion, private=True)
    assert here.repos[REPO].private and HfApi().model_info(REPO).private
    push_whole(conversion, revision="trial")
    assert "trial" in here.repos[REPO].branches
    model = AutoModelForCausalLM.from_pretrained(REPO, revision="trial")
    assert hf_attnswap.inspect(model)[0].swapped == "hedgehog+window"
    push_whole(conversion, "user/open")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    url = push(prepare(conversion, "user/open", tags=["other"], **ORIGIN), "user/open", create_pr=True)
    assert url == f"{here.url}/user/open/discussions/1"
    assert b"- other" in here.repos["user/open"].at("refs/pr/1")[1]["README.md"]
    assert b"- other" not in here.repos["user/open"].at("main")[1]["README.md"]
    with pytest.raises(UsageError, match="user/converted"):
        push_whole(conversion)


def test_the_card_that_went_is_valid_there(here, conversion):
    push_whole(conversion)
    card = ModelCard.load(REPO)
    card.validate()
    assert card.data.base_model == "org/base" and card.data.license == "apache-2.0"
    card.data.license = 3
    with pytest.raises(ValueError, match="license"):
        card.validate()


def test_licence_and_base_model_are_taken_over(here, conversion, tmp_path):
    with pytest.raises(UsageError, match="which model was converted is not known: pass its Hub id with --base_model"):
        prepare(conversion, REPO)
    with pytest.raises(UsageError, match="the licence of org/base is not known: pass it with --license"):
        prepare(conversion, REPO, base_model="org/base")
    api = HfApi()
    api.create_repo("user/base")
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id="user/base")
    tiny().save_pretrained(tmp_path / "base")
    api.upload_folder(repo_id="user/base", folder_path=tmp_path / "base")
    model = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained("user/base"), "relu")
    model.save_pretrained(tmp_path / "swapped")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped")
    again.save_pretrained(tmp_path / "again")
    readme = prepare(tmp_path / "again", REPO)[-1].path_or_fileobj.decode()
    data = ModelCard(readme).data
    assert (data.base_model, data.license) == ("user/base", "mit")
    restored = hf_attnswap.restore(again)
    assert not hasattr(restored.config, "attnswap")


def test_push_to_hub_of_a_model(here, conversion):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(conversion), AutoTokenizer.from_pretrained(conversion)
    model.push_to_hub(REPO, max_shard_size="30KB", tokenizer=tokenizer, tags=["mine"], **ORIGIN)
    files = here.repos[REPO].at("main")[1]
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} <= set(files)
    readme = files["README.md"].decode()
    assert "mine" in ModelCard(readme).data.tags and "was measured" in readme and "More Information" not in readme
    tokenizer.push_to_hub(REPO)
    assert here.repos[REPO].at("main")[1]["README.md"].decode() == readme
    plain = tiny()
    plain.push_to_hub("user/plain")
    assert "attnswap" not in here.repos["user/plain"].at("main")[1]["config.json"].decode()


def test_own_card_and_report_go_as_they_are(here, conversion, tmp_path):
    folder = shutil.copytree(conversion, tmp_path / "own")
    (folder / "README.md").write_text("mine")
    (folder / ".hidden").write_text("not for others")
    push(prepare(folder, REPO), REPO)
    files = here.repos[REPO].at("main")[1]
    assert files["README.md"] == b"mine" and ".hidden" not in files


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["attnswap", "push", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


CLI_ORIGIN = ("--base_model", "org/base", "--license", "apache-2.0")


def test_dry_run_lists_and_sends_nothing(here, conversion, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, conversion, REPO, "--dry_run", *CLI_ORIGIN)
    assert code == 0 and not here.log and not here.repos
    assert all(path.name in out and f"{path.stat().st_size:,}" in out for path in conversion.iterdir())
    assert "README.md" in out and not (conversion / "README.md").exists()


def one_line(result: tuple[int, str, str]) -> str:
    code, _, error = result
    lines = [line for line in error.splitlines() if line.startswith("attnswap: ")]
    assert code and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def test_one_line_for_each_failure(here, conversion, monkeypatch, capsys, tmp_path):
    def failing(*arguments) -> str:
        return one_line(run(monkeypatch, capsys, *arguments, *CLI_ORIGIN))

    monkeypatch.setenv("HF_TOKEN", "")
    assert "there is no Hub token: run `hf auth login`, or set HF_TOKEN" in failing(conversion, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_invented")
    assert "the Hub does not know this token" in failing(conversion, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "this token may not write to user/converted" in failing(conversion, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert "this token may not write to other/converted" in failing(conversion, "other/converted")
    HfApi().create_repo("user/taken")
    tiny().save_pretrained(tmp_path / "plain")
    HfApi().upload_folder(repo_id="user/taken", folder_path=tmp_path / "plain")
    assert "user/taken is taken: it exists and is no conversion" in failing(conversion, "user/taken")
    assert "'user/a b' is not the name of a repository" in failing(conversion, "user/a b")
    assert "has no config.json" in failing(tmp_path, REPO)
    assert "nothing is swapped" in failing(tmp_path / "plain", REPO)
    assert REPO not in here.repos


def test_no_network_is_one_line(conversion, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    said = one_line(run(monkeypatch, capsys, conversion, REPO, *CLI_ORIGIN))
    assert "the Hub at http://127.0.0.1:9 cannot be reached" in said and "again to continue" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached" in one_line(run(monkeypatch, capsys, conversion, REPO, *CLI_ORIGIN))


@pytest.fixture
def folder(conversion, tmp_path) -> Path:
    """A copy of the conversion, to be changed."""
    return shutil.copytree(conversion, tmp_path / "folder")


@pytest.mark.parametrize("what", ("shard", "index", "config"))
def test_folders_that_are_not_whole_are_refused(folder, what):
    if what == "shard":
        sorted(folder.glob("*.safetensors"))[0].unlink()
    elif what == "index":
        (folder / "model.safetensors.index.json").write_text("{")
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not whole|damaged"):
        prepare(folder, REPO, **ORIGIN)


def test_nothing_goes_but_what_a_conversion_is_made_of(folder, monkeypatch, capsys):
    others = [
        "credentials.json",
        "train.py",
        "a.PKL",
        "b.joblib",
        "c.dill",
        "optimizer.pt",
        "model.bin",
        ".env",
        "x.safetensors",
    ]
    whole = {path.name for path in folder.iterdir()}
    for name in others:
        (folder / name).write_text("mine")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tools.jinja", "mine.txt"):
        (folder / "additional_chat_templates" / name).write_text("{{ messages }}")
    (folder / "chat_template.jinja").symlink_to(folder / "config.json")
    with pytest.raises(UsageError, match="chat_template.jinja is a link"):
        prepare(folder, REPO, **ORIGIN)
    (folder / "chat_template.jinja").unlink()
    sent = {operation.path_in_repo for operation in prepare(folder, REPO, **ORIGIN)}
    assert sent == whole | {"README.md", "additional_chat_templates/tools.jinja"}
    _, out, _ = run(monkeypatch, capsys, folder, REPO, "--dry_run", "--json", *CLI_ORIGIN)
    assert set(json.loads(out)["left_out"]) == {*others, "checkpoints/", "additional_chat_templates/mine.txt"}
    _, out, _ = run(monkeypatch, capsys, folder, REPO, "--dry_run", *CLI_ORIGIN)
    assert all(name in out for name in ("left out, as no part of a conversion:", "credentials.json", "checkpoints/"))


def test_links_lead_nowhere(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    for name in ("tokenizer.json", next(path.name for path in folder.glob("*.safetensors"))):
        kept = (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(secret)
        with pytest.raises(UsageError, match=f"{name} is a link: a push sends what lies in the folder alone"):
            prepare(folder, REPO, **ORIGIN)
        (folder / name).unlink()
        kept.rename(folder / name)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in ("../secret.json", "tokenizer.json", 3, str(secret)):
        index.write_text(json.dumps(content | {"weight_map": {"a": name}}))
        with pytest.raises(UsageError, match="index.json is damaged: weight_map has"):
            prepare(folder, REPO, **ORIGIN)


@pytest.mark.parametrize("what", ("nan", "infinity", "shape", "missing", "unknown", "torn", "text"))
def test_weights_that_are_not_those_of_the_config_are_refused(folder, what):
    path = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(path)
    name = min(weights)
    if what in ("torn", "text"):
        path.write_bytes(path.read_bytes()[:-4] if what == "torn" else b"not weights")
    else:
        if what in ("nan", "infinity"):
            weights[name].view(-1)[-1] = {"nan": math.nan, "infinity": -math.inf}[what]
        elif what == "shape":
            weights[name] = weights[name][:-1].clone()
        elif what == "missing":
            del weights[name]
        else:
            weights["model.layers.0.mlp.extra"] = weights[name].clone()
        save_file(weights, path, {"format": "pt"})
    says = {
        "nan": f"{name} has NaN or infinity", "infinity": f"{name} has NaN or infinity", "torn": "no whole safetensors",
        "text": "no whole safetensors", "shape": f"do not belong together: {name} has shape",
        "missing": f"do not belong together: {name} is not among", "unknown": "mlp.extra is among the weights, and",
    }  # fmt: skip
    with pytest.raises(UsageError, match=re.escape(says[what])) as error:
        prepare(folder, REPO, **ORIGIN)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_no_code_goes_but_that_which_this_package_writes(tmp_path):
    folder = tmp_path / "portable"
    hf_attnswap.swap(tiny(), "elu").save_pretrained(folder, portable=True)
    assert "modeling_attnswap.py" in {operation.path_in_repo for operation in prepare(folder, REPO, **ORIGIN)}
    code, config = folder / "modeling_attnswap.py", folder / "config.json"
    text, content = code.read_text(), json.loads(config.read_text())
    code.write_text(f"{text}\nprint('mine')\n")
    with pytest.raises(UsageError, match="modeling_attnswap.py is not what this version of hf_attnswap writes"):
        prepare(folder, REPO, **ORIGIN)
    code.write_text(text)
    content["auto_map"] |= {"AutoTokenizer": ["mine.Slow", None]}
    config.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="names mine.Slow, which is code.*USER/NAME--mine.Slow"):
        prepare(folder, REPO, **ORIGIN)
    content["auto_map"] |= {"AutoTokenizer": ["user/code--mine.Slow", None]}
    config.write_text(json.dumps(content))
    assert prepare(folder, REPO, **ORIGIN)


def test_all_that_is_missing_is_asked_for_at_once(conversion, monkeypatch, capsys):
    monkeypatch.setattr("hf_attnswap.publish.push.get_token", lambda: "hf_writer")
    said = one_line(run(monkeypatch, capsys, conversion, REPO, "--dry_run"))
    assert "--base_model (or none), and its licence with --license" in said and "token" not in said
    monkeypatch.setattr("hf_attnswap.publish.push.get_token", lambda: None)
    said = one_line(run(monkeypatch, capsys, conversion, REPO, "--dry_run"))
    assert (
        "--base_model (or none), and its licence" in said and "a Hub token is missing too: run `hf auth login`" in said
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, out, _ = run(monkeypatch, capsys, conversion, REPO, "--dry_run", *CLI_ORIGIN)
    assert code == 0 and "a Hub token is missing: run `hf auth login`, or set HF_TOKEN" in out


@pytest.mark.parametrize("name", ("a b", "../x", "user/na`me", "user/x\n# y", "", "a/b/c"))
def test_names_of_repositories_are_checked(conversion, name):
    with pytest.raises(UsageError, match="is not the name of a repository"):
        prepare(conversion, name, **ORIGIN)
    with pytest.raises(UsageError, match="base_model is .*; expected a Hub id"):
        prepare(conversion, REPO, base_model=name or " ", licence="mit")
