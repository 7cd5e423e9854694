"""Code that a repository brings runs where that was asked for, and nothing asks on the terminal."""

import json

import pytest

from hf_attnswap import UsageError
from hf_attnswap.sources.models import architecture, load, load_any, load_classifier, require_weights


@pytest.mark.parametrize("read", (architecture, load, load_any, load_classifier, require_weights))
def test_nobody_is_asked_whether_to_run_code(tmp_path, monkeypatch, read):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    mine = {"AutoConfig": "mine.Config", "AutoTokenizer": ["mine.Slow", None], "AutoModelForCausalLM": "mine.Model"}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "mine", "auto_map": mine}))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UsageError, match="contains custom code"):
        read(str(tmp_path), *([["a", "b"]] if read is load_classifier else []))
