"""The package as it is published: types, documentation, wheel and sdist."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from local_hub import Hub
from tiny_conversion import save_conversion

import hf_attnswap

ROOT = Path(hf_attnswap.__file__).parents[1]

DOCUMENTED = re.search(r"pdoc --output-directory build/docs (.+)", (ROOT / "Makefile").read_text())[1].split()


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def test_the_public_interface_is_type_checked(tmp_path):
    needs("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert (ROOT / "hf_attnswap" / "py.typed").is_file()


def test_everything_public_has_a_docstring_and_the_pages_build(tmp_path):
    needs("pdoc")
    for name in hf_attnswap.__all__:
        assert name == "__version__" or getattr(hf_attnswap, name).__doc__, name
    # In a process of its own: it imports everything anew.
    command = [sys.executable, "-m", "pdoc", "--output-directory", str(tmp_path), *DOCUMENTED]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "SwapConfig" in (tmp_path / "hf_attnswap.html").read_text()
    assert (tmp_path / "hf_attnswap" / "publish" / "push.html").is_file()


def test_the_changelog_has_this_version():
    assert f"\n## {hf_attnswap.__version__}" in (ROOT / "CHANGELOG.md").read_text()


SMOKE = """
import json, sys, torch
import hf_attnswap
from transformers import AutoModelForCausalLM, LlamaConfig, pipeline
config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
model = hf_attnswap.swap(AutoModelForCausalLM.from_config(config), "hedgehog+window", window=4)
assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
assert len(hf_attnswap.available()) > 20
text = pipeline("text-generation", sys.argv[1])("the cat sat on", max_new_tokens=8, do_sample=False)
print("FOUND" + json.dumps({"file": hf_attnswap.__file__, "version": hf_attnswap.__version__, "text": text}))
"""


@pytest.mark.long
def test_wheel_and_sdist_build_and_a_pushed_checkpoint_generates_the_same_with_the_wheel_alone(tmp_path):
    """Its dependencies are those of this environment, as installing torch again would take minutes."""
    needs("build")

    from transformers import pipeline

    unwanted = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "examples")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=unwanted)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_attnswap").rglob("*.py")} <= inside
    assert {"hf_attnswap/py.typed", "hf_attnswap/publish/portable_runtime.txt"} <= inside
    assert not any(name.startswith("tests") for name in inside)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in inside if n.endswith("/METADATA"))).decode()
    for said in ("Name: hf_attnswap", "License-Expression: Apache-2.0", "Requires-Python: >=3.10", "# hf_attnswap"):
        assert said in metadata
    assert any(name.endswith("/LICENSE") for name in tarfile.open(sdist).getnames())

    environment = tmp_path / "clean"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", wheel]
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    subprocess.run(command, check=True, timeout=300, env=keep)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    folder = save_conversion(tmp_path / "converted")
    with Hub() as hub:
        keep |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        push = [sys.executable, "-m", "hf_attnswap", "push", str(folder), "user/converted"]
        push += ["--base_model", "none", "--license", "mit"]
        here = keep | {"HF_TOKEN": "hf_writer", "PYTHONPATH": str(ROOT)}
        subprocess.run(push, check=True, env=here, capture_output=True, timeout=600)
        run = subprocess.run(
            [python, "-c", SMOKE, "user/converted"], capture_output=True, text=True, env=keep, cwd=tmp_path, timeout=600
        )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("FOUND")[1])
    assert Path(found["file"]).is_relative_to(environment) and found["version"] == hf_attnswap.__version__
    expected = pipeline("text-generation", str(folder))("the cat sat on", max_new_tokens=8, do_sample=False)
    assert found["text"] == expected
    listed = subprocess.run(
        [environment / "bin" / "attnswap", "ls", "--json"], capture_output=True, text=True, env=keep, timeout=300
    )
    assert listed.returncode == 0 and len(json.loads(listed.stdout)) > 20
