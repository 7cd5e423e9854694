"""A plan reaches stages, recipes and commands, and what they record says all of it."""

import json

import pytest
import torch
import yaml
from swapped_models import plain

from hf_attnswap import SwapConfig, UsageError
from hf_attnswap.integration.swapping import describe
from hf_attnswap.sources.models import load
from hf_attnswap.sources.plans import write_plan
from hf_attnswap.tradeoff import Arm
from hf_attnswap.training.batches import batches

PLANS = {
    "keep": SwapConfig("window", options={"window": 8}, keep=["0.1", "2.0"]),
    "layers": SwapConfig(layers={"0:2": {"attention": "window", "window": 8}, "2.1": "elu"}),
}
SAYS = {
    "keep": "window in 4 key/value groups of 3 layers, softmax in the other 2",
    "layers": "window in 4 and elu in 1 key/value groups of 3 layers, softmax in the other 1",
}
every_plan = pytest.mark.parametrize("name", PLANS)


@pytest.fixture
def plan(name, tmp_path) -> str:
    return str(write_plan(tmp_path / "plan.yaml", PLANS[name], plain()))


@every_plan
def test_a_recipe_trains_a_plan_and_its_record_needs_no_file(name, plan, train, checkpoint, text, tmp_path):
    given = ["--model_name_or_path", checkpoint, "--train_file", text]
    train("--recipe", ["plan", "--plan", plan, *given, "--max_train_tokens", "128", "--output_dir", tmp_path / "out",
                       "--block_size", "32", "--text_lengths", "8,32"])  # fmt: skip
    folder = tmp_path / "out" / "1_distill"
    assert describe(load(str(folder / "model"))[0]) == SAYS[name]
    did = json.loads((folder / "stage.json").read_text())["options"]
    assert "plan" not in did
    again = tmp_path / "again.yaml"
    of_swap = {key: did.pop(key) for key in ("attention", "layers", "keep", "options") if key in did}
    stages = [{"stage": "distill", **did}]
    again.write_text(yaml.safe_dump({"model_name_or_path": checkpoint, **of_swap, "stages": stages}))
    train("--recipe", [str(again), "--train_file", text, "--output_dir", tmp_path / "second"])
    assert describe(load(str(tmp_path / "second" / "1_distill" / "model"))[0]) == SAYS[name]


@pytest.mark.parametrize("name", ["keep"])
def test_a_stage_takes_a_plan_or_says_what_does_not_fit(name, plan, train, checkpoint, save_tiny, text, tmp_path):
    given = ["--train_file", text, "--max_train_steps", "1", "--block_size", "32", "--output_dir", tmp_path / "out"]
    train("distill", ["--model_name_or_path", checkpoint, "--plan", plan, *given])
    with pytest.raises(UsageError, match="--plan says all of the swap: leave out --attention"):
        train("distill", ["--model_name_or_path", checkpoint, "--plan", plan, "--attention", "elu", *given])
    other = save_tiny("gpt2")
    with pytest.raises(UsageError, match="was made for a model whose model_type is 'llama'"):
        train("distill", ["--model_name_or_path", other, "--plan", plan, *given[:-1], tmp_path / "other"])
    with pytest.raises(UsageError, match="--keep belong to --attention"):
        train("distill", ["--model_name_or_path", checkpoint, "--keep", "0.1", *given[:-1], tmp_path / "third"])


@every_plan
def test_convert_and_an_arm_take_the_same_plan(name, plan, checkpoint, attnswap, tmp_path):
    assert attnswap("convert", checkpoint, "--plan", plan, "--output_dir", tmp_path / "out").code == 0
    assert describe(load(str(tmp_path / "out"))[0]) == SAYS[name]
    arm = Arm.parse(plan)
    assert (arm.label, arm.keep, arm.layers) == ("plan", PLANS[name].keep, PLANS[name].layers)
    assert arm.swap.plan({0: 2, 1: 2, 2: 2}) == PLANS[name].plan({0: 2, 1: 2, 2: 2})


def test_layers_that_are_softmax_already_are_left_as_they_are(train, checkpoint, text, tmp_path, capsys):
    wide = '{"0": {"attention": "hedgehog+window", "window": 64}, "1:": {"attention": "hedgehog+window", "window": 4}}'
    given = ["--model_name_or_path", checkpoint, "--train_file", text, "--max_train_steps", "2", "--block_size", "32"]
    train("align", [*given, "--attention", "elu", "--layers", wide, "--output_dir", tmp_path / "out"])
    assert "1 layers are within 0.0001 of softmax, and stay as they are" in "".join(capsys.readouterr())
    model = load(str(tmp_path / "out" / "model"))[0]
    moved = {name: bool(p.any()) for name, p in model.named_parameters() if name.endswith("query_map.delta")}
    assert [moved[name] for name in sorted(moved)] == [False, True, True]
    with pytest.raises(UsageError, match="within 0.0001 of softmax's: nothing to align"):
        train("align", [*given, "--attention", "hedgehog+window", "--option", "window=64", "--output_dir",
                        tmp_path / "other"])  # fmt: skip


def test_an_arm_names_groups_on_the_command_line():
    arm = Arm.parse("window:window=16,keep=[8.10,0.1]")
    assert arm.keep == ["8.10", "0.1"] and arm.options == {"window": 16, "sinks": 4}
    with pytest.raises(UsageError, match="keep has 'x'"):
        Arm.parse("window:keep=[x]")


def test_batches_are_cut_into_texts_of_each_length_in_turn():
    blocks = torch.arange(8 * 12).view(8, 12) + 100
    drawn = batches(blocks, 2, seed=0, text_lengths=(4, 12, 6), start=(1,))
    assert [tuple(drawn[number].shape) for number in range(4)] == [(6, 4), (2, 12), (4, 6), (6, 4)]
    whole = batches(blocks, 2, seed=0)[0].view(6, 4)
    assert torch.equal(drawn[0][:, 1:], whole[:, 1:]) and (drawn[0][:, 0] == 1).all()
    assert (blocks >= 100).all()  # the blocks themselves stay as they are


@pytest.mark.parametrize("lengths", ("7", "x", "0", "8,,16", "64"))
def test_lengths_that_do_not_divide_a_block_are_refused(lengths, train, checkpoint, text, tmp_path):
    with pytest.raises(UsageError, match="--text_lengths has .*; expected divisors of --block_size 32"):
        train("distill", ["--model_name_or_path", checkpoint, "--attention", "window", "--train_file", text,
                          "--max_train_steps", "1", "--block_size", "32", "--text_lengths", lengths,
                          "--output_dir", tmp_path / "out"])  # fmt: skip
