"""`attnswap doctor`: what is installed, what was built, and what runs."""

import json

import pytest
import torch
import transformers

import hf_attnswap
from hf_attnswap import native
from hf_attnswap.native import build
from hf_attnswap.ops import backends
from hf_attnswap.ops.backends import OPS


def told(attnswap) -> tuple[dict, str]:
    """The report as JSON and as words."""
    results = [attnswap("doctor", *more) for more in (["--json"], [])]
    assert {(r.code, r.err) for r in results} == {(0, "")}
    return json.loads(results[0].out), results[1].out


def test_versions_and_forms(attnswap):
    found, words = told(attnswap)
    versions = found["versions"]
    assert versions["torch"] == torch.__version__ and versions["transformers"] == transformers.__version__
    assert versions["hf_attnswap"] == hf_attnswap.__version__ and {"python", "accelerate", "triton"} <= set(versions)
    assert all((version or "not installed") in words for version in versions.values())
    for op, forms in found["ops"].items():
        runs = next(form["backend"] for form in forms["cpu"] if form["missing"] is None)
        assert any(line.split()[:3] == [op, "cpu", runs] for line in words.splitlines())
    assert set(found["ops"]) == set(OPS)
    kernels = found["kernels"]
    assert kernels["missing"] == native.missing() and (kernels["runs"] in kernels["built_for"] or kernels["missing"])


def test_what_is_forced(attnswap, monkeypatch):
    monkeypatch.setattr(backends._Here, "forced", None)
    monkeypatch.setenv(backends.VARIABLE, "scores=reference")
    found, words = told(attnswap)
    assert found["forced"]["backends"] == {"scores": "reference"} and "scores=reference" in words
    assert [form["backend"] for form in found["ops"]["scores"]["cpu"]] == ["reference"]
    monkeypatch.setattr(backends._Here, "forced", None)
    monkeypatch.setenv(backends.VARIABLE, "fast")
    assert "no op has a backend 'fast'" in attnswap("doctor").err


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The path of a library that is not there."""
    path = tmp_path / "kernels.so"
    for module in (native, build):
        monkeypatch.setattr(module, "LIBRARY", path)
    native._loaded.cache_clear()
    yield path
    monkeypatch.undo()
    native._loaded.cache_clear()


def test_an_installation_without_kernels(attnswap, library):
    words = " ".join(told(attnswap)[1].split())
    assert "the CPU kernels are not built (python -m hf_attnswap.native builds them)" in words


def test_a_library_that_was_built_again_is_described_as_it_is(library):
    library.write_bytes(b"of other sources")
    assert "built from other sources" in native.describe()
    native._loaded.cache_clear()
    library.write_bytes(native.fingerprint().encode())
    assert "cannot be loaded" in native.describe()  # of these sources, and no library
