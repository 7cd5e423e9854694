"""Texts and labels from files as they are."""

import json

import pytest

from hf_attnswap import UsageError
from hf_attnswap.data import TextSource

TEXTS = ['he said "yes" .', '" unclosed', "null", "3", "a , b"]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_texts_and_labels_of_a_file(tmp_path, suffix):
    """Nothing is taken for a quotation, a missing value or a number."""
    path = tmp_path / f"texts.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": i}) + "\n" for i, text in enumerate(TEXTS)))
    elif suffix == "csv":
        rows = ['"' + text.replace('"', '""') + f'",{i}\n' for i, text in enumerate(TEXTS)]
        path.write_text("text,label\n" + "".join(rows))
    else:
        path.write_text("text\tlabel\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(TEXTS)))
    source = TextSource(str(path))
    assert list(source.labelled("label")) == [(text, str(i)) for i, text in enumerate(TEXTS)]
    assert list(source.rows()) == TEXTS
    with pytest.raises(UsageError, match="has no column 'class'; it has text, label"):
        list(source.labelled("class"))
