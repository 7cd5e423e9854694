"""The package as it is published: types, documentation, wheel and sdist."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from local_hub import Hub
from tiny_conversion import save_conversion

import hf_attnswap

ROOT = Path(hf_attnswap.__file__).parents[1]


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.mark.long
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
    command = [sys.executable, "docs/build.py", str(tmp_path)]
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
found = {"file": hf_attnswap.__file__, "version": hf_attnswap.__version__, "text": text}
found["imported"] = [sys.modules[name].__file__ for name in ("torch", "transformers", "accelerate", "huggingface_hub")]
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    needs("build")
    folder = tmp_path_factory.mktemp("package")
    unwanted = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "dist", "examples", "benchmarks", "model_cards"
    )
    source = shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.mark.long
def test_wheel_and_sdist_hold_the_package_and_its_metadata(built):
    wheel, sdist = built
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_attnswap").rglob("*.py")} <= inside
    assert {
        "hf_attnswap/training/recipes/plain.yaml",
        "hf_attnswap/py.typed",
        "hf_attnswap/publish/portable_runtime.txt",
    } <= inside
    assert not any(name.startswith("tests") for name in inside)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in inside if n.endswith("/METADATA"))).decode()
    for said in ("Name: hf_attnswap", "License-Expression: Apache-2.0", "Requires-Python: >=3.10", "# hf_attnswap"):
        assert said in metadata
    assert any(name.endswith("/LICENSE") for name in tarfile.open(sdist).getnames())


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory) -> Path:
    """A virtual environment with the wheel and what it depends on, from the package index, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    constraint = folder / "constraint.txt"  # the builds of torch and transformers that this environment has
    pinned = {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}
    constraint.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "-q", "--no-compile", "-c", str(constraint), str(built[0])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=without_python_variables())
    if run.returncode and re.search("connection|network|name resolution|timed out", run.stderr, re.I):
        pytest.skip(f"the dependencies cannot be installed here: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    return folder / "venv"


def without_python_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}


@pytest.mark.long
def test_what_one_environment_pushed_another_with_the_wheel_alone_generates_from(clean, tmp_path):
    """The double stands in for the Hub; the two environments share no file but through it."""
    from transformers import pipeline

    folder = save_conversion(tmp_path / "converted")
    expected = pipeline("text-generation", str(folder))("the cat sat on", max_new_tokens=8, do_sample=False)
    keep = without_python_variables()
    with Hub() as hub:
        keep |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        push = [sys.executable, "-m", "hf_attnswap", "push", str(folder), "user/converted"]
        push += ["--base_model", "none", "--license", "mit"]
        here = keep | {"HF_TOKEN": "hf_writer", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf_here")}
        subprocess.run(push, check=True, env=here, capture_output=True, timeout=600)
        shutil.rmtree(folder)
        run = subprocess.run(
            [clean / "bin" / "python", "-c", SMOKE, "user/converted"],
            capture_output=True, text=True, env=keep, cwd=tmp_path, timeout=1500,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("FOUND")[1])
    assert Path(found["file"]).is_relative_to(clean) and found["version"] == hf_attnswap.__version__
    assert all(Path(path).is_relative_to(clean) for path in found["imported"])
    assert found["text"] == expected
    listed = subprocess.run(
        [clean / "bin" / "attnswap", "ls", "--json"], capture_output=True, text=True, env=keep, timeout=600
    )
    assert listed.returncode == 0 and len(json.loads(listed.stdout)) > 20
