"""The notebook runs from top to bottom: its cells in this process, which needs no Jupyter."""

import ast
import importlib
import json
import re
import tempfile

import pytest
from training_fixtures import ROOT

CELLS = json.loads((ROOT / "examples" / "convert.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_what_the_notebook_imports_is_there():
    assert not any(cell.get("outputs") for cell in CELLS)
    for node in ast.walk(ast.parse("\n".join(CODE))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_attnswap"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.long
@pytest.mark.usefixtures("_fresh_accelerator")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {}
    for code in CODE:
        exec(code, names)
    printed = capsys.readouterr().out
    assert "2 of 8 key/value groups keep softmax" in printed
    assert len(re.findall(r"[\d.]+ times the perplexity of softmax", printed)) == 3
    before, after = re.findall(r"cache of ([\d,]+) bytes", printed)
    assert int(after.replace(",", "")) < int(before.replace(",", ""))
