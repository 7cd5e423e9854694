"""Items of multiple choice and files of text: whatever they hold is read, or refused with its place."""

import pytest
from drawn import changed, damaged, json_bytes, values
from hypothesis import strategies as st
from refusals import EXAMPLES, answered, every
from tiny_models import tiny

from hf_attnswap.evaluation.choices import read_items, score_choices
from hf_attnswap.sources.texts import TextSource, token_blocks

ITEMS = (
    {"prompt": "the sky is", "choices": ["blue", "a fish"], "answer": 0},
    {"ctx": "the cat", "endings": ["sat", "ran", "fell"], "label": "2"},
    {"sentence_good": "cats sleep", "sentence_bad": "cats sleeps"},
    {"context": "she looked at the", "continuation": "sky"},
    {"sentence": "the cat sat on _ mat", "option1": "the", "option2": "a", "answer": "1"},
)
ROWS = ({"text": "the cat sat on the mat"}, {"text": "a fish"}, {"text": "", "label": 1})
SUFFIXES = (".json", ".jsonl", ".txt", ".md", ".csv", ".tsv")


@st.composite
def lines(draw, rows):
    """The lines of a .jsonl file: rows that are right, rows with a change or two, and other things."""
    right = st.sampled_from(rows).map(json_bytes)
    line = st.one_of(
        right, right, st.sampled_from(rows).flatmap(changed).map(json_bytes), values.map(json_bytes), damaged
    )
    return b"\n".join(draw(st.lists(line, min_size=1, max_size=4)))


@pytest.fixture
def read_and_score(letters):
    model = tiny()

    def call(path):
        items = read_items(path)
        assert len(score_choices(model, letters, items).acc) == len(items)

    return call


@pytest.mark.drawn
@EXAMPLES
def test_items_and_texts(examples, tmp_path, letters, read_and_score):
    def check(drawn):
        kind, suffix, content = drawn
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        if kind == "items":
            answered(read_and_score, path)
        else:
            answered(token_blocks, TextSource(str(path)), letters, 4)

    every(
        examples,
        st.one_of(
            st.tuples(st.just("items"), st.just(".jsonl"), lines(ITEMS)),
            st.tuples(st.just("texts"), st.sampled_from(SUFFIXES), lines(ROWS)),
        ),
        check,
    )
