"""Strategies: values that JSON and YAML can hold, and what was right until one place in it was changed."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

# What programs write by mistake, and what parsers trip over.
AWKWARD = (
    None, True, False, 0, 1, -1, 2, 7, 10**30, -(2**63), 0.0, 0.5, -1.5, 1e400, -1e400, float("nan"), "", " ", "0", "1",
    "-1", "1::2", "::0", ":", "a:b", "0,2", "9" * 5000, "null", "true", "NaN", "[", "{", "[" * 2000, "\n", "a\nb", "\t",
    "\x1b[31m", "é", "\u2028", "[/red]", "$x_1$", "%s", "{0}", "--x", "-", "../x", "/", "~", "elu", "relu", "hedghog",
    "hedgehog+window", "softmax", "window", "causal", "cross", "sdpa", "name", [], [0], [0, 0], [-1], [0, "1"], [None],
    [[]], {}, {"a": 1}, {"0": "elu"}, {"attention": "elu"}, {"": None},
)  # fmt: skip

texts = st.one_of(st.sampled_from([x for x in AWKWARD if isinstance(x, str)]), st.text(max_size=20))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.one_of(
    st.sampled_from(AWKWARD).map(copy.deepcopy),  # hypothesis draws the same again, so nobody may write into them
    st.recursive(
        scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
        max_leaves=6,
    ),
)  # fmt: skip


@st.composite
def changed(draw, valid: Any, most: int = 2) -> Any:
    """A copy of something valid in which up to `most` places hold another value, are missing, or are new."""
    whole = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(0, most))):
        holder, key = whole, 0
        while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 3)):
            holder = holder[key]
            key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        what = draw(st.sampled_from(("value", "value", "missing", "new")))
        if what == "new" and isinstance(holder[key], dict):
            holder[key][draw(texts)] = draw(values)
        elif what == "missing" and holder is not whole:
            del holder[key]
        else:
            holder[key] = draw(values)
        if not whole:
            break
    return whole[0]


# What stands in a file that should hold JSON, YAML or text.
damaged = st.binary(max_size=40) | st.sampled_from(
    (
        b"", b"\n", b"null", b"NaN", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe{", b"\xef\xbb\xbf{}",
        b"{}{}", b'"\\ud800"', b"\0", b'{"a": 1, "a": 2}', b"{", b"\r\n\r\n", b'{"text": "a"}\nnull\n', b"- [",
    )
)  # fmt: skip


def json_bytes(value: Any) -> bytes:
    """The value as a file of JSON."""
    return json.dumps(value).encode()
