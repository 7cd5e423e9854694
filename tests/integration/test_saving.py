"""A saved conversion comes back whole, or refuses loudly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import randomise, tiny, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import hf_attnswap
from hf_attnswap import UsageError

CASES = {
    "relu": dict(attention="relu"),
    "relu with gain": dict(attention="relu", gain=True, alpha=0.5),
    "sigmoid": dict(attention="sigmoid"),
    "elu": dict(attention="elu"),
    "hedgehog": dict(attention="hedgehog"),
    "hedgehog+window": dict(attention="hedgehog+window", window=8, sinks=2),
    "slice": dict(attention="hedgehog", layers="1::2"),
    "negative": dict(attention="sigmoid", layers=[-1]),
    "mixed": dict(layers={0: "relu_power", "1:": {"attention": "elu+window", "window": 4}}, sinks=1),
    "softmax": dict(attention="softmax"),
}
FAMILIES = {"gpt2": "hedgehog+window", "gpt_neox": "hedgehog", "qwen2": "sigmoid", "mistral": "elu"}
IDS = tokens(20)


def converted(case: str):
    family = case if case in FAMILIES else "llama"
    settings = CASES.get(case) or dict(attention=FAMILIES[case])
    return randomise(hf_attnswap.swap(tiny(family), **settings))


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the last bits, which depend on where in memory a model lies; softmax in place of a variant is 1 off."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One folder per case, and the logits that its model gave."""
    folder = tmp_path_factory.mktemp("saved")
    torch.save(IDS, folder / "ids.pt")
    for case in (*CASES, *FAMILIES):
        model = converted(case)
        model.save_pretrained(folder / case)
        torch.save((logits(model), model.state_dict()), folder / f"{case}.pt")
    return folder


LOAD = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root = Path(sys.argv[1])
folders = sorted(path for path in root.iterdir() if path.is_dir())
without = {folder.name: [] for folder in folders}
sys.modules["hf_attnswap"] = None  # as where it is not installed
for folder in folders:
    for asked in ({}, {"attn_implementation": "sdpa"}, {"attn_implementation": None}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **asked)
        except ValueError as error:
            without[folder.name].append(str(error))
del sys.modules["hf_attnswap"]
import hf_attnswap
ids = torch.load(root / "ids.pt")
found = {}
for folder in folders:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        logits, weights = torch.load(root / f"{folder.name}.pt")
        with torch.no_grad():
            off = (model(ids).logits - logits).abs().max().item()
        same = all(torch.equal(tensor, weights.pop(name)) for name, tensor in model.state_dict().items())
        keys = {name: sorted(keys) for name, keys in info.items() if keys}
        found[folder.name] = {"off": off, "same": same and not weights, "keys": keys}
    except Exception as error:
        found[folder.name] = {"error": f"{type(error).__name__}: {error}"}
print("FOUND" + json.dumps([without, found]))
"""


@pytest.fixture(scope="module")
def loaded(saved) -> tuple[dict, dict]:
    """What a fresh process says of each folder before it imports the package, and after."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(saved)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(hf_attnswap.__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.split("FOUND")[1])


@pytest.mark.parametrize("case", (*CASES, *FAMILIES))
def test_round_trip_in_a_fresh_process(loaded, case):
    found = loaded[1][case]
    assert found.pop("off") < 1e-4
    assert found == {"same": True, "keys": {}}


@pytest.mark.parametrize("case", (*CASES, *FAMILIES))
def test_without_the_package_loading_raises(loaded, case):
    said = loaded[0][case]
    assert len(said) == 3 and all("pip install hf_attnswap" in error for error in said)


@pytest.mark.parametrize("case", CASES)
def test_load_save_load(saved, case, tmp_path):
    once = AutoModelForCausalLM.from_pretrained(saved / case)
    once.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((saved / case / "config.json").read_text())
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), torch.load(saved / f"{case}.pt")[0])


@pytest.mark.parametrize("case", CASES)
def test_restore_after_loading(saved, case):
    model = hf_attnswap.restore(AutoModelForCausalLM.from_pretrained(saved / case))
    assert_same(logits(model), logits(tiny()))
    assert model.config._attn_implementation == "sdpa"


def test_saving_after_restore_saves_a_plain_model(saved, tmp_path):
    hf_attnswap.restore(AutoModelForCausalLM.from_pretrained(saved / "hedgehog+window")).save_pretrained(tmp_path)
    assert "attnswap" not in (tmp_path / "config.json").read_text()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(logits(model), logits(tiny()))


def test_the_plan_is_readable(saved):
    entry = AutoConfig.from_pretrained(saved / "mixed").attnswap
    options = {"unrotate": False, "half_life": 0.0, "window": 4, "sinks": 1}
    assert entry["format_version"] == 3 and entry["kept"] == "sdpa"
    assert [(g["attention"], g["layers"]) for g in entry["swapped"]] == [("relu_power", [0]), ("elu+window", [1, 2])]
    assert entry["swapped"][1]["options"] == options


@pytest.mark.parametrize("case", ("hedgehog+window", "slice"))
@pytest.mark.parametrize("auto", (AutoModel, AutoModelForSequenceClassification))
def test_other_classes(saved, case, auto):
    model, info = auto.from_pretrained(saved / case, output_loading_info=True)
    assert not any("attnswap" in key for keys in info.values() for key in keys)
    base = model if auto is AutoModel else model.model
    with torch.no_grad():
        expected = converted(case).model(IDS).last_hidden_state
        assert_same(base.eval()(IDS).last_hidden_state, expected)
    found = [entry.swapped for entry in hf_attnswap.inspect(model)]
    assert found == (["hedgehog+window"] * 3 if case == "hedgehog+window" else [None, "hedgehog", None])


def test_the_base_model_alone_can_be_swapped_and_saved(tmp_path):
    base = hf_attnswap.swap(tiny().model, "hedgehog")
    randomise(base).save_pretrained(tmp_path)
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert_same(model(IDS).last_hidden_state, base(IDS).last_hidden_state)


@pytest.mark.parametrize("case", ("hedgehog+window", "mixed"))
def test_bfloat16(saved, case):
    model, info = AutoModelForCausalLM.from_pretrained(saved / case, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    for name, parameter in converted(case).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16()), name
    expected, found = torch.load(saved / f"{case}.pt")[0], logits(model)
    assert found.dtype == torch.bfloat16 and (found - expected).square().mean() < 0.05 * expected.square().mean()


def test_device_map_and_shards(tmp_path):
    model = converted("hedgehog+window")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")), logits(model))


def test_implementation_of_the_kept_layers_is_saved(tmp_path):
    model = tiny()
    model.set_attn_implementation("eager")
    randomise(hf_attnswap.swap(model, "sigmoid", layers=[1])).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(logits(again), logits(model))
    assert hf_attnswap.restore(again).config._attn_implementation == "eager"


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("case", ("relu", "slice"))
def test_asking_for_softmax_while_loading_raises(saved, case, implementation):
    with pytest.raises(UsageError, match=f"attn_implementation='{implementation}' would run softmax"):
        AutoModelForCausalLM.from_pretrained(saved / case, attn_implementation=implementation)
    AutoModelForCausalLM.from_pretrained(saved / case, attn_implementation="attnswap")


@pytest.mark.parametrize("case", ("relu", "slice"))
def test_asking_for_no_implementation_changes_nothing(saved, case):
    """As `transformers serve` does."""
    model = AutoModelForCausalLM.from_pretrained(saved / case, attn_implementation=None)
    assert_same(logits(model), torch.load(saved / f"{case}.pt")[0])
    assert model.config._experts_implementation != model.config.experts_implementation


ASK_FOR_SDPA = {
    "dict": lambda folder: AutoModelForCausalLM.from_pretrained(folder, attn_implementation={"": "sdpa"}),
    "config": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    ),
    "from_config": lambda folder: AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), attn_implementation="sdpa"
    ),
    "base model": lambda folder: AutoModel.from_pretrained(folder, attn_implementation="sdpa"),
    "pipeline": lambda folder: pipeline(
        "text-generation", str(folder), tokenizer=object(), model_kwargs={"attn_implementation": "sdpa"}
    ),
    "afterwards": lambda folder: set_and_run(AutoModelForCausalLM.from_pretrained(folder), "sdpa"),
}


def set_and_run(model, implementation):
    model.set_attn_implementation(implementation)
    return model(IDS)


@pytest.mark.parametrize("case", ("elu", "slice"))
@pytest.mark.parametrize("how", ASK_FOR_SDPA)
def test_no_way_of_asking_for_softmax_gives_it_in_silence(saved, case, how):
    with pytest.raises((ValueError, RuntimeError), match="would run softmax"):  # a pipeline quotes it in its own
        ASK_FOR_SDPA[how](saved / case)


REGISTERED = """
import sys, torch
import hf_attnswap
from transformers import AutoModelForCausalLM, PreTrainedModel
# As where another copy of the package, or a program of its own, has registered the name: nothing builds the variants.
PreTrainedModel.post_init = PreTrainedModel.post_init.__wrapped__
PreTrainedModel._finalize_model_loading = staticmethod(PreTrainedModel._finalize_model_loading.__wrapped__)
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        print("ran")
"""


@pytest.mark.long
def test_a_name_that_is_registered_already_is_no_licence_to_run_softmax(saved):
    run = subprocess.run(
        [sys.executable, "-c", REGISTERED, *(str(saved / case) for case in ("elu", "slice", "hedgehog+window"))],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(hf_attnswap.__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    said = run.stdout.splitlines()
    assert len(said) == 3 and all("the module was not built by it" in line for line in said), run.stdout + run.stderr


def group(**changed):
    entry = {"attention": "elu", "options": {}, "kind": "causal", "layers": [0, 1, 2]} | changed
    return {"format_version": 3, "kept": "sdpa", "swapped": [entry]}


@pytest.mark.parametrize(
    ("entry", "says"),
    (
        (group() | {"format_version": 4}, "format_version 4; expected 3: upgrade hf_attnswap"),
        (group() | {"format_version": 2}, "format_version 2; expected 3: an older hf_attnswap wrote it; convert"),
        (group() | {"format_version": "1"}, "format_version '1'"),
        (group() | {"format_version": True}, "format_version True"),
        (group() | {"format_version": 0}, "format_version 0"),
        ({"format_version": 1}, "format_version 1; expected 3"),
        (group() | {"kept": None}, "damaged"),
        (group() | {"swapped": 3}, "damaged"),
        (group() | {"swapped": [3]}, "damaged"),
        (group() | {"swapped": []}, "attnswap"),
        (group(options=None), "damaged"),
        (group(layers=["x"]), "damaged"),
        (group(layers=[0, 7]), "7"),
        (group(attention="eluu"), "Unknown attention 'eluu'. Did you mean 'elu'"),
        (group(options={"window": 3}), "elu has no option 'window'"),
        (group(attention="window", options={"window": 0}), "window is 0"),
        (group(attention=["elu"]), "attnswap|attention"),
        ("elu", "attnswap"),
        ([], "attnswap"),
        ({}, "attnswap"),
        (None, "attnswap"),
    ),
    ids=str,
)
def test_damaged_entry_raises_one_sentence(tmp_path, entry, says):
    hf_attnswap.swap(tiny(), "elu").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attnswap"] = entry
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=says) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", (["attnswap"], ["attn_implementation"], ["attn_implementation", "attnswap"]))
def test_without_the_entry_nothing_says_what_is_swapped_without_the_guard_something_does(saved, tmp_path, missing):
    shutil.copytree(saved / "hedgehog", tmp_path / "edited")
    path = tmp_path / "edited" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in missing}))
    if "attnswap" in missing:
        with pytest.raises(UsageError, match="attnswap"):
            AutoModelForCausalLM.from_pretrained(path.parent)
        return
    model = AutoModelForCausalLM.from_pretrained(path.parent)
    assert_same(logits(model), torch.load(saved / "hedgehog.pt")[0])


def test_fewer_layers_than_the_plan_raises(saved):
    config = AutoConfig.from_pretrained(saved / "relu", num_hidden_layers=2)
    with pytest.raises(UsageError, match="layers has 2, but the model's attention layers are 0 to 1"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.long
def test_gguf_model_can_be_swapped_and_saved(smollm2, tmp_path):
    from hf_attnswap.sources.models import load

    model, tokenizer = load(smollm2)
    hf_attnswap.swap(model, "hedgehog+window", layers="::10", window=8)
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert_same(again(ids).logits, expected)
