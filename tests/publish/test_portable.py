"""A portable conversion needs one file and trust_remote_code, gives the same numbers, and never softmax."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import randomise, tiny, tiny_encoder, tokens
from transformers import AutoModelForCausalLM

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.publish import portable

CASES = {
    "hybrid": ("llama", dict(attention="hedgehog+window", window=8, sinks=2)),
    "part": ("qwen2", dict(attention="relu_power", p=8, layers="1:")),
    "mixed": ("mistral", dict(layers={0: "sigmoid", 1: {"attention": "t2r+window", "window": 4}})),
    "groups": ("llama", dict(attention="hedgehog+window", window=8, keep=["0.1", "2.0"])),
    "delta": ("llama", dict(attention="delta")),
}
PADDED = torch.ones(2, 20, dtype=torch.long).index_fill(1, torch.arange(3), 0)

LOAD = """
import json, sys
sys.modules["hf_attnswap"] = None  # as where it is not installed
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM as Auto
found = {}
for saved in sorted(Path(sys.argv[1]).glob("*.pt")):
    ids, mask, expected, padded, text = torch.load(saved)
    folder = saved.with_suffix("")
    model, info = Auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        off = (model(ids).logits - expected).abs().max().item()
        off_padded = (model(ids, attention_mask=mask).logits - padded)[:, 3:].abs().max().item()
        same = torch.equal(model.generate(ids[:1], max_new_tokens=6, do_sample=False), text)
    refusals = []
    for given in ({"attn_implementation": "sdpa", "trust_remote_code": True}, {}):
        try:
            Auto.from_pretrained(folder, **given)
            refusals.append("it loaded")
        except ValueError as error:
            refusals.append(str(error))
    found[saved.stem] = [off, off_padded, same, sum(map(len, info.values())), *refusals]
print("FOUND" + json.dumps(found))
"""


def test_without_the_package_the_numbers_are_the_same(tmp_path):
    ids = tokens(20)
    for case, (family, settings) in CASES.items():
        model = randomise(hf_attnswap.swap(tiny(family), **settings))
        model.save_pretrained(tmp_path / case, portable=True)
        with torch.no_grad():
            text = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
            torch.save(
                (ids, PADDED, model(ids).logits, model(ids, attention_mask=PADDED).logits, text),
                tmp_path / f"{case}.pt",
            )
    root = str(Path(hf_attnswap.__file__).parents[1])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("FOUND")[1])
    assert set(found) == set(CASES)
    for case, (off, off_padded, same, keys, softmax, untrusted) in found.items():
        assert off < 1e-3 and off_padded < 1e-3 and same and not keys, (case, off, off_padded, same)
        assert "would run softmax: leave attn_implementation out" in softmax
        assert "pip install hf_attnswap" in untrusted


def test_with_the_package_a_portable_folder_is_as_any_other(tmp_path):
    model = randomise(hf_attnswap.swap(tiny(), "hedgehog"))
    model.save_pretrained(tmp_path / "one", portable=True)
    text = (tmp_path / "one" / portable.FILE).read_text()
    assert "\nimport hf_attnswap" not in text and "from hf_attnswap" not in text and len(text.splitlines()) < 700
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(again).__module__.startswith("transformers.")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens(20)).logits, model(tokens(20)).logits)
    again.save_pretrained(tmp_path / "two")
    assert "auto_map" not in json.loads((tmp_path / "two" / "config.json").read_text())


def test_what_cannot_be_portable_is_refused(tmp_path):
    swapped = ((tiny_encoder(), "sigmoid"), (tiny(), "cosformer"), (tiny("gpt_neox"), "elu"))
    for model in (hf_attnswap.swap(model, name) for model, name in swapped):
        with pytest.raises(UsageError, match="cannot be portable"):
            model.save_pretrained(tmp_path, portable=True)
    with pytest.raises(UsageError, match="this one is not swapped"):
        tiny().save_pretrained(tmp_path, portable=True)
