"""Rows of files, with the place of whatever is wrong, and JSON and YAML that nothing can hang or end."""

import json

import pytest

from hf_attnswap import UsageError
from hf_attnswap.sources.conversions import find
from hf_attnswap.sources.structured import read_json, read_yaml
from hf_attnswap.sources.texts import TextSource

ROWS = [{"text": "a b", "n": 1}, {"text": "c\u2028d", "n": None}, {"text": "", "n": [1]}]
LINES = "\n".join(json.dumps(row) for row in ROWS)


def rows(path, content, **told):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(TextSource(str(path), **told).rows())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", f"\ufeff{LINES}\n\n"),
        ("a.json", f"\n{LINES}"),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
    ],
)
def test_json_in_every_form(tmp_path, name, content):
    assert rows(tmp_path / name, content) == [row["text"] for row in ROWS]


def test_one_object_over_several_lines(tmp_path):
    assert rows(tmp_path / "a.json", json.dumps(ROWS[0], indent=1)) == ["a b"]


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    assert rows(tmp_path / "a.csv", "text,n\n007,1\n1e3,2\n") == ["007", "1e3"]
    assert list(TextSource(str(tmp_path / "a.csv")).labelled("n")) == [("007", "1"), ("1e3", "2")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "null", "a.json', line 1: it is null; expected an object"),
        ("a.jsonl", "null", "a.jsonl', line 1: it is null; expected an object"),
        ("a.jsonl", '{"text": "a"}\n\nnull', "a.jsonl', line 3: it is null; expected an object"),
        ("a.json", "[null]", "a.json', item 1: it is null; expected an object"),
        ("a.json", "3", "line 1: it is 3; expected an object"),
        ("a.json", '"text"', "line 1: it is 'text'; expected an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', "a.jsonl', line 2: text is 3; expected a text"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', "line 2: text is null; expected a text"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', "line 2 has no column 'text'; it has txt"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "line 2: text is .* half of a surrogate pair at 0"),
        ("a.jsonl", '{"text": ["a", "b"]}', r"line 1: text is \['a', 'b'\]; expected a text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2: not JSON: "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8: "),
        ("a.jsonl", "[" * 100_000, "line 1: nested too deep"),
        ("a.json", "[" * 100 + "]" * 100, "nested deeper than 64 levels"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.txt", b"\xff\xfe", "cannot read text from .*a.txt"),
        ("a.parquet", "PAR1", "cannot read text from .*a.parquet"),
        ("a.csv", "text,n\na,1\nb,2,3,4\n", "cannot read text from .*a.csv"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, says):
    with pytest.raises(UsageError, match=says) as error:
        rows(tmp_path / name, content)
    assert "\n" not in str(error.value)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, r"aliases \(\*a\) are not read.* line 2"),
        ("a: [", "not readable as YAML: .* line 1"),
        ("a: 2001-99-99", "not readable as YAML: "),
        ("[" * 1500, "nested too deep"),
        ("[" * 100 + "]" * 100, "nested deeper than 64 levels"),
        ("a: \x00", "not readable as YAML: "),
    ],
)
def test_yaml_that_is_none_or_could_hang(tmp_path, text, says):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_plain_yaml_and_json_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("stages:\n- {stage: align, p: 2.5}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"stages": [{"stage": "align", "p": 2.5}]}
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}


RECIPES = (f"{BOMB}stages:\n- stage: *i", "stages: 3", "stages:\n- stage: [a]", "stages: []", "- x")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_of_a_conversion_that_is_none(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UsageError, match="recipe.yaml is not what the run of a recipe writes"):
        find(tmp_path)
