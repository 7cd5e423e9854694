"""The comparison from end to end on a tiny model: what it measures, what it adds, what it refuses."""

import json
import math
import shlex
import signal
import subprocess
import sys

import pytest
from tiny_models import tiny

from hf_attnswap import UsageError, report
from hf_attnswap.data import TextSource
from hf_attnswap.tradeoff import Settings, measure, with_controls


class Letters:
    """A tokenizer of bytes, as far as `token_blocks` and `count_units` know one."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [3 + b % 60 for b in text.encode()]})

    def decode(self, ids, **_):
        return "".join("a " if i % 2 else "b" for i in ids.tolist())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The cat sat on the mat, and then it went out into the rain. " * 30)
    return TextSource(str(path))


def settings(**changes):
    given = dict(
        arms=("softmax", "window:window=4,sinks=1", "elu", "elu+window:window=4,sinks=1"),
        context_lengths=(32,), max_eval_tokens=256, lengths=(16, 32), rounds=2, decode_tokens=2, align_tokens=0,
        block_size=32, diagnose_tokens=24,
    )  # fmt: skip
    return Settings(**given | changes)


@pytest.fixture(scope="module")
def measured(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tradeoff") / "out"
    found = measure(tiny(), Letters(), text, None, settings(), folder, model_name="tiny", command="test")
    return found, folder


def test_the_report_is_valid_and_can_be_drawn(measured, tmp_path):
    found, _ = measured
    report.write_all(found, tmp_path)
    assert report.read(tmp_path / "report.json") == json.loads(json.dumps(found))
    assert (tmp_path / "layers.png").is_file() and (tmp_path / "positions.png").is_file()


def test_perplexity_and_paired_comparisons(measured):
    arms = {arm["label"]: arm for arm in measured[0]["arms"]}
    assert {arm["status"] for arm in arms.values()} == {"measured"}
    softmax, hybrid = (arms[label]["perplexity"][0] for label in ("softmax", "elu+window:window=4,sinks=1"))
    assert softmax["ratio"] is None and {a["arm"] for a in softmax["against"]} == set(arms) - {"softmax"}
    assert hybrid["ratio"]["value"] == pytest.approx(hybrid["perplexity"] / softmax["perplexity"])
    assert hybrid["ratio"]["items"] == 8 and hybrid["ratio"]["few"]
    (against,) = [a for a in hybrid["against"] if a["arm"] == "elu"]
    assert against["value"] == pytest.approx(hybrid["perplexity"] / arms["elu"]["perplexity"][0]["perplexity"])
    assert math.log(softmax["word_perplexity"]) > math.log(softmax["perplexity"])
    assert softmax["by_position"][-1]["last"] == 31


def test_checks_growth_and_layers(measured):
    softmax, *arms = measured[0]["arms"]
    assert softmax["checks"] == [] and softmax["diagnostics"] is None
    for arm in arms:
        assert [c["name"] for c in arm["checks"]] == ["causal", "padding", "state", "definition", "seam"]
        assert all(c["passed"] for c in arm["checks"])
        assert arm["diagnostics"]["tokens"] == 24 and len(arm["diagnostics"]["layers"]) == 3
        assert arm["growth"]["prefill_s"]["low"] <= arm["growth"]["prefill_s"]["high"]
    assert arms[0]["growth"]["prefill_s"]["lengths"] == 2


def test_an_interrupted_run_goes_on(measured, text):
    found, folder = measured
    (folder / "measured" / "elu.json").unlink()
    said = []
    again = measure(
        tiny(), Letters(), text, None, settings(), folder, model_name="tiny", command="test", progress=said.append
    )
    assert [line for line in said if "perplexity" in line] == ["elu: perplexity at context 32"]
    assert again["arms"] == found["arms"]


@pytest.mark.long
@pytest.mark.parametrize("line", ("elu: checks", "elu: speed at 32 tokens, round 2 of 2"))
def test_what_was_measured_survives_kill_9(stories260k, text_file, tmp_path, line):
    told = f"tradeoff {stories260k} --train_file {text_file} --output_dir {tmp_path / 'out'} --arm elu --no_controls "
    told += "--context_length 64 --max_eval_tokens 256 --block_size 64 --align_tokens 0 --decode_tokens 1 --rounds 2 "
    told += "--length 16 --length 32 --json"
    command = [sys.executable, "-m", "hf_attnswap", *shlex.split(told)]
    kept = tmp_path / "out" / "measured"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while line not in said and process.poll() is None:
            said = process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out" / "report.json").exists()
    before = {file.name: json.loads(file.read_text()) for file in kept.glob("*.json")}
    assert set(before) == {"settings.json", "softmax.json"} | ({"elu.json", "speed.json"} if "speed" in line else set())

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = again.stderr.splitlines()
    assert "softmax: already measured" in lines and not any(said.startswith("softmax: perplexity") for said in lines)
    assert ("elu: checks" in lines) == ("elu.json" not in before)
    after = {file.name: json.loads(file.read_text()) for file in kept.glob("*.json")}
    for name in set(before) - {"speed.json"}:
        assert after[name] == before[name]
    for length, rounds in before.get("speed.json", {}).items():
        assert after["speed.json"][length][: len(rounds)] == rounds
    found = json.loads(again.stdout)
    assert found == report.read(tmp_path / "out" / "report.json")
    assert [entry["prefill_s"]["runs"] for arm in found["arms"] for entry in arm["speed"]] == [2] * 4
    if "speed" in line:  # round 1 of both lengths, and 2 of the first, are those of the run that was killed
        assert {length: len(rounds) for length, rounds in before["speed.json"].items()} == {"16": 2, "32": 1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_eval_tokens": 63}, "max_eval_tokens is 63, less than two blocks of 32"),
        ({"lengths": (10_000,)}, "10000 and 32 are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(text, tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        measure(tiny(), Letters(), text, None, settings(**changes), tmp_path, model_name="tiny", command="test")


def test_a_run_with_other_settings_is_not_continued(measured, text):
    with pytest.raises(UsageError, match="holds a run with rounds = 2, not 3"):
        measure(tiny(), Letters(), text, None, settings(rounds=3), measured[1], model_name="tiny", command="test")


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (["relu"], ["softmax", "none", "window", "relu"]),
        (["elu+window"], ["softmax", "none", "window", "elu", "elu+window"]),
        (
            ["hedgehog+window:window=32"],
            ["softmax", "none", "window:window=32", "hedgehog", "hedgehog+window:window=32"],
        ),
        (["elu+window", "elu", "window", "softmax"], ["none", "elu+window", "elu", "window", "softmax"]),
        (["window:window=8"], ["softmax", "none", "window", "window:window=8"]),
    ],
)
def test_controls_are_there_by_default(arms, expected):
    assert with_controls(arms) == expected
