"""Recipes: whatever YAML they hold is a list of stages, or refused with its place."""

import pytest
import yaml
from drawn import changed, damaged, values
from hypothesis import strategies as st
from refusals import EXAMPLES, answered, every

from hf_attnswap.training.recipe import read_recipe

RECIPES = (
    {
        "model_name_or_path": "model", "attention": "hedgehog+window", "options": {"window": 8},
        "max_train_tokens": 1000, "train_file": "text.txt",
        "stages": [{"stage": "align", "share": 0.25}, {"stage": "distill", "share": 0.75}],
    },
    {
        "model_name_or_path": "model", "attention": "relu_norm", "layers": "1::2", "dataset_name": "org/texts",
        "stages": [{"stage": "finetune", "max_train_steps": 3, "learning_rate": 1e-4, "use_lora": True}],
    },
    {
        "builds_on": "maps", "model_name_or_path": "model", "attention": "elu", "max_train_tokens": 1000,
        "train_file": "text.txt",
    },
)  # fmt: skip
# What YAML has beside JSON.
SNIPPETS = (
    "a: &a [*a]", "a: *b", "? [1]: 2", "2001-99-99", "stages: 2001-02-30", "!!python/object:os.system {}", "!!int x",
    "!!float x", "!!timestamp x", "!!binary _", "a: 0x_", "a: 0b", "1:60:60", "{a: b: c}", "---\n---\n", "<<: 3",
    "<<: [1]", "a: !!set {b, c}", "%YAML 9.9\n---\na", "a:\tb", "builds_on: maps", "builds_on: recipe.yaml",
    "builds_on: 5", "builds_on: ../..", "builds_on: [maps]", "- stage: align", "stages: [{stage: [x]}]",
    "stages: [{stage: {}}]", "1: 2", "null: 3", "attention: null", "options: [window]", "options: {1: 2}",
    "layers: [0, 1]", "stages: [align]",
)  # fmt: skip


def yaml_bytes(value) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")


@st.composite
def contents(draw):
    """A recipe with a change or two, lines of YAML under one another, or something else."""
    whole = st.sampled_from(RECIPES).flatmap(changed).map(yaml_bytes)
    snippets = st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=3).map("\n".join).map(str.encode)
    return draw(
        st.one_of(
            whole, whole, whole, st.tuples(whole, snippets).map(b"\n".join), snippets, values.map(yaml_bytes), damaged
        )
    )


@pytest.mark.drawn
@EXAMPLES
def test_recipes(examples, tmp_path):
    def check(drawn):
        content, arguments = drawn
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content)
        stages = answered(read_recipe, path, arguments)
        assert stages is None or all(isinstance(name, str) and isinstance(given, dict) for name, given in stages)

    given = {"model_name_or_path": "m", "attention": "elu", "train_file": "x", "max_train_steps": 1}
    every(examples, st.tuples(contents(), st.sampled_from(({}, given))), check)
