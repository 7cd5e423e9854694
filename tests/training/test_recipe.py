"""Recipes: what they say, what they may not say, and a run that goes on where it stopped."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_encoder

from hf_attnswap import UsageError, attentions, cli, report
from hf_attnswap.integration.swapping import describe
from hf_attnswap.publish import measured
from hf_attnswap.sources import conversions
from hf_attnswap.sources.models import load
from hf_attnswap.tradeoff.rows import stage_of
from hf_attnswap.training import conversion, loop
from hf_attnswap.training import recipe as recipe_module
from hf_attnswap.training.recipe import read_recipe


@pytest.fixture
def recipe(checkpoint, text, tmp_path):
    """`recipe(key=value)` writes one of three short stages with these changes, and is the command line for it."""

    def write(**changes):
        content = {
            "model_name_or_path": checkpoint, "attention": "hedgehog+window", "options": {"window": 4, "sinks": 1},
            "train_file": text, "block_size": 32, "max_train_steps": 3, "checkpointing_steps": 2,
            "stages": [
                {"stage": "align"},
                {"stage": "distill", "learning_rate": 1e-3, "use_lora": True},
                {"stage": "finetune", "max_train_tokens": 64, "block_size": 16},
            ],
        }  # fmt: skip
        content.update(changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return ["--recipe", str(path), "--output_dir", str(tmp_path / "out")]

    return write


@pytest.fixture
def convert(train):
    """`convert(command)` runs a recipe; the words after --recipe."""
    return lambda command: train("--recipe", command[1:])


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_stages_follow_each_other_and_run_alone_with_what_is_printed(train, convert, recipe, tmp_path, capsys):
    convert(recipe())
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "1_align", "2_distill", "3_finetune"}
    assert describe(load(str(out / "3_finetune" / "model"))[0]) == "hedgehog+window in 3 layers"
    assert [len(read_log(out / name)) for name in ("1_align", "2_distill", "3_finetune")] == [3, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    started = "2_distill: accelerate launch -m hf_attnswap.training distill "
    command = next(line.removeprefix(started).split() for line in lines if line.startswith(started))
    assert "--attention" not in command and "--teacher_name_or_path" not in command
    train("distill", [*command[:-1], tmp_path / "alone"])
    assert same(weights(tmp_path / "alone"), weights(out / "2_distill"))
    convert(recipe())
    assert capsys.readouterr().err.count("is done") == 3


def test_a_run_that_was_cut_off_goes_on_in_its_stage(convert, recipe, tmp_path, monkeypatch, capsys):
    given = recipe()
    convert([*given[:-1], str(tmp_path / "whole")])
    save_checkpoint, calls = loop.save_checkpoint, []

    def cut(*arguments):
        save_checkpoint(*arguments)
        calls.append(arguments)
        if len(calls) == 2:  # in the second stage
            raise ConnectionError("power cut")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(loop, "save_checkpoint", cut)
        convert(given)
    capsys.readouterr()
    convert(given)
    said = capsys.readouterr().err
    assert "1_align is done" in said and "going on from" in said and "step_2" in said
    for stage in ("1_align", "2_distill", "3_finetune"):
        assert same(weights(tmp_path / "whole" / stage), weights(tmp_path / "out" / stage))


def test_a_model_whose_projections_moved_is_not_its_own_teacher(convert, recipe, checkpoint, capsys):
    stages = [{"stage": "align", "train": "attention", "learning_rate": 1e-3}, {"stage": "distill"}]
    convert(recipe(attention="relu_norm", options={"gain": True}, max_train_steps=1, stages=stages))
    assert f"--teacher_name_or_path {checkpoint}" in capsys.readouterr().err


def test_softmax_trained_first_is_what_is_converted_and_what_teaches(convert, recipe, text, tmp_path, capsys):
    hybrid = {"attention": "hedgehog+window", "options": {"window": 4, "sinks": 1}}
    stages = [{"stage": "finetune"}, {"stage": "align", "train": "attention", **hybrid}, {"stage": "distill"}]
    out = tmp_path / "out"
    convert(recipe(attention="softmax", options=None, max_train_steps=2, stages=stages))
    said = capsys.readouterr().err
    assert "1_finetune/model has softmax in 3 layers, which gives way to hedgehog+window" in said
    assert f"--teacher_name_or_path {out / '1_finetune' / 'model'}" in said
    found = conversions.find(out)
    assert [group["attention"] for group in found.swapped] == ["hedgehog+window"]
    arm = SimpleNamespace(training=[stage_of(stage) for stage in found.training])
    again = measured.recipe(SimpleNamespace(model=SimpleNamespace(name="org/base")), arm, "org/base")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    told = [
        (name, given.get("attention")) for name, given in read_recipe(tmp_path / "again.yaml", {"train_file": text})
    ]
    assert told == [("finetune", "softmax"), ("align", "hedgehog+window"), ("distill", None)]


def test_stages_that_were_run_one_by_one_are_known(train, checkpoint, text, tmp_path):
    """By the folder of the stage, that of its model and a link to it; and what the model came from."""
    given = {"train_file": text, "block_size": 32, "max_train_steps": 1}
    words = [part for name, value in given.items() for part in (f"--{name}", value)]
    first, second = tmp_path / "aligned", tmp_path / "distilled"
    train("align", ["--model_name_or_path", checkpoint, "--attention", "hedgehog", *words, "--output_dir", first])
    train("distill", ["--model_name_or_path", first / "model", *words, "--output_dir", second])
    (tmp_path / "link").symlink_to(second / "model")
    for path, name in ((second, "distilled"), (second / "model", "distilled"), (tmp_path / "link", "link")):
        found = conversions.find(path)
        assert (found.name, [stage["stage"] for stage in found.training]) == (name, ["align", "distill"])
    assert [stage["stage"] for stage in conversions.find(first).training] == ["align"]


@pytest.mark.parametrize("attention, options", [("hedgehog", None), ("hedgehog+window", {"window": 8})])
def test_maps_are_aligned_first_then_the_modules_around_them(recipe, tmp_path, attention, options):
    recipe(attention=attention, options=options, stages=None, max_train_steps=None, max_train_tokens=4000)
    (one, maps), (two, modules), (three, distill) = read_recipe(tmp_path / "recipe.yaml")
    assert (one, two, three) == ("align", "align", "distill")
    assert [stage["max_train_tokens"] for stage in (maps, modules, distill)] == [200, 1400, 2400]
    assert (maps["attention"], maps.get("options"), maps["learning_rate"]) == (attention, options, 1e-2)
    assert "train" not in maps and modules["train"] == "attention"
    assert not {"attention", "options"} & {*modules, *distill}


@pytest.mark.parametrize(
    "attention, options, taken", [("elu", None, None), ("relu_power", {"p": 8}, {"gain": True, "p": 8})]
)
def test_without_maps_the_modules_are_aligned(recipe, tmp_path, attention, options, taken):
    recipe(attention=attention, options=options, stages=None, max_train_steps=None, max_train_tokens=4000)
    (one, align), (two, distill) = read_recipe(tmp_path / "recipe.yaml")
    assert (one, two) == ("align", "distill")
    assert (align["train"], align["learning_rate"], align["final_learning_rate"]) == ("attention", 1e-3, 1e-5)
    assert (align["max_train_tokens"], distill["max_train_tokens"]) == (1000, 3000)
    assert align.get("options") == taken
    assert distill["learning_rate"] == 1e-4 and not {"attention", "options"} & distill.keys()


GIVEN = {"model_name_or_path": "m", "train_file": "t.txt", "max_train_tokens": 100_000}


@pytest.mark.parametrize("name", recipe_module.names())
def test_a_recipe_of_the_package_takes_model_and_text_as_arguments(name):
    given = GIVEN if "attention:" in recipe_module.names()[name].read_text() else {**GIVEN, "attention": "relu_norm"}
    stages = read_recipe(name, given)
    assert stages[0][1]["model_name_or_path"] == "m" and all(options["train_file"] == "t.txt" for _, options in stages)
    assert 99_990 <= sum(options["max_train_tokens"] for _, options in stages) <= 100_000
    for key in GIVEN:
        with pytest.raises(UsageError, match=f"give .*--{key}"):
            read_recipe(name, {other: value for other, value in given.items() if other != key})
    assert recipe_module.describe(name).endswith(".")


@pytest.mark.parametrize("name", attentions.names())
def test_the_family_of_a_variant_names_its_recipe(name):
    variant = attentions.get(name)
    assert variant.family in recipe_module.names()
    parameters = list(variant(attentions.Heads(1, 1, 8)).parameters())
    assert (variant.family == "maps") == bool(parameters and variant.cost_class == "linear")
    assert (variant.family == "gain") == ("gain" in variant.options())


def test_arguments_stand_in_place_of_the_top_of_a_recipe(recipe, tmp_path):
    path = recipe()[1]
    stages = read_recipe(path, {"block_size": 8, "dataset_name": "org/text", "options": {"window": 2}})
    (_, align), (_, distill), (_, finetune) = stages
    assert (align["block_size"], finetune["block_size"]) == (8, 16)  # what a stage says itself stays
    assert align["options"] == {"window": 2, "sinks": 1}
    assert {options["dataset_name"] for _, options in stages} == {"org/text"} and "train_file" not in distill


def test_a_recipe_builds_on_another_one_beside_it(recipe, tmp_path):
    recipe()
    (tmp_path / "longer.yaml").write_text("{builds_on: recipe.yaml, max_train_steps: 5, options: {window: 8}}")
    (_, align), *_ = read_recipe(tmp_path / "longer.yaml")
    assert (align["max_train_steps"], align["options"]) == (5, {"window": 8, "sinks": 1})


def test_an_unknown_recipe_is_told_the_names():
    with pytest.raises(UsageError, match="neither a file nor one of control, .*Did you mean 'plain'"):
        read_recipe("plaim")


def test_a_recipe_of_the_package_runs_by_its_name(train, checkpoint, text, tmp_path):
    given = ["plain", "--attention", "relu_norm", "--option", "gain=true", "--model_name_or_path", checkpoint]
    given += ["--train_file", text, "--max_train_tokens", "128", "--block_size", "32", "--output_dir", tmp_path / "out"]
    train("--recipe", given)
    assert [len(read_log(tmp_path / "out" / name)) for name in ("1_align", "2_distill")] == [1, 3]
    assert describe(load(str(tmp_path / "out" / "2_distill" / "model"))[0]) == "relu_norm in 3 layers"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(learning_rat=1), "unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        (dict(stages=[{"stage": "aline"}]), "stage 1 of recipe .* is 'aline'. Did you mean 'align'"),
        (dict(stages=[{"stage": "align", "temprature": 2}]), r"stage 1 \(align\) .* unknown key 'temprature'"),
        (dict(stages=[{"stage": "distill", "temprature": 2}]), "Did you mean 'temperature'"),
        (dict(stages=[{"stage": "align", "learning_rate": "fast"}]), r"stage 1 \(align\).*invalid float value: 'fast'"),
        (dict(stages=[]), r"recipe .*, line \d+: stages is \[\]"),
        (
            dict(
                attention="elu", options=None, stages=[{"stage": "distill"}, {"stage": "distill", "attention": "relu"}]
            ),
            r"stage 2 \(distill\) .* swaps to 'relu' what is 'elu' already",
        ),
        (dict(attention=None), "has no attention: give --attention"),
        (dict(train_file=None), "give either --train_file or --dataset_name, which are missing"),
        (dict(stages=None, max_train_steps=None), "takes a share of max_train_tokens, which is null"),
        (dict(stages=None, max_train_tokens=100, attention="hedghog"), "Did you mean 'hedgehog'"),
    ],
)
def test_a_recipe_that_is_wrong_is_one_clear_error(convert, recipe, tmp_path, change, message):
    command = recipe(**change)
    with pytest.raises(UsageError, match=message):
        convert(command)
    assert not (tmp_path / "out").exists()


LAUGHS = "a: &a [ha, ha, ha]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
TOP = "model_name_or_path: m\nattention: elu\ntrain_file: t.txt\nmax_train_tokens: 100\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (LAUGHS, r"recipe\.yaml: not readable as YAML: .*aliases \(\*a\) are not read.* line 2"),
        ("stages: [{stage: align}", r"recipe\.yaml: not readable as YAML: .*line 1"),
        ("a: " + "[" * 1200, "not readable as YAML: nested too deep"),
        ("null", "holds null; expected keys"),
        (TOP + "stages: null", r"recipe '.*/recipe.yaml', line 5: stages is null; expected a list"),
        (TOP + "stages:\n- stage: [align]", r"stage 1 of recipe '.*', line 6: stage is \['align'\]"),
        (TOP + "1: 2\nstages: [{stage: align}]", r"recipe '.*', line 5: unknown key 1\. Known"),
        (TOP + "seed: true\n", r"stage 1 \(align\) of recipe '.*', line 5: seed is True; expected a text or a number"),
        (TOP + "weight_decay: .nan\n", r"line 5: weight_decay is nan; expected a text or a number"),
        (TOP + "use_lora: 'no'\n", r"line 5: use_lora is 'no'; expected true or false"),
        (TOP + "dtype: --help\nblock_size: -3\n", r"line 6: argument --block_size: -3 is not positive"),
        (TOP + "text_column: 2001-01-01\n", r"line 5: text_column is datetime.date\(2001, 1, 1\); expected a text"),
        (TOP + "options: [window]\n", r"line 5: options is \['window'\]; expected names with values"),
        (TOP + "options: {windw: 3}\n", r"line 5: elu has no option 'windw'"),
        (TOP + "options: {a: null}\n", r"line 5: options is \{'a': None\}; expected names with values"),
        (TOP + "stages:\n- stage: align\n  share: true\n", r"line 7: share is True; expected a part of 1"),
        (TOP + "stages:\n- stage: align\n- stage: align\n  weights_loss: much\n", r"stage 2 .*, line 8: .*'much'"),
        (TOP.replace("elu", "hedghog") + "stages: [{stage: align}]", r"line 2: Unknown attention .*'hedgehog'"),
        (TOP.replace("elu", "[elu]"), r"recipe '.*', line 2: \['elu'\]; expected a text"),
        (TOP + "builds_on: recipe.yaml", "builds on itself"),
        (TOP + "builds_on: [maps]", r"line 5: builds_on is \['maps'\]; expected the name of a recipe"),
        (TOP + 'builds_on: "a\\0b"', r"line 5: builds_on is 'a.x00b'; expected the name"),
    ],
)
def test_a_faulty_recipe_is_told_file_line_key_and_value(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_recipe(tmp_path / "recipe.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_the_place_of_what_is_wrong_is_that_of_the_one_who_said_it(tmp_path):
    """A recipe that it builds on, the recipe of the family, or the command line."""
    (tmp_path / "below.yaml").write_text(TOP + "seed: x\n")
    (tmp_path / "above.yaml").write_text("builds_on: below.yaml\nlayers: '0'\n")
    with pytest.raises(
        UsageError, match=r"stage 1 \(align\) of recipe 'below.yaml', line 5: .*invalid seed value: 'x'"
    ):
        read_recipe(tmp_path / "above.yaml")
    with pytest.raises(UsageError, match=r"recipe .plain., line \d+: takes a share of max_train_tokens, which is null"):
        read_recipe(tmp_path / "above.yaml", {"seed": 3, "max_train_steps": 5})
    with pytest.raises(UsageError, match=r"of the command line: .*invalid seed value: 'y'"):
        read_recipe(tmp_path / "above.yaml", {"seed": "y"})


def test_what_two_stages_have_in_common_is_written_twice(convert, recipe, checkpoint, text, tmp_path):
    layers = [1, 2]
    stages = [
        (name, {"model_name_or_path": checkpoint, "attention": attention, "layers": layers, "train_file": text,
                "block_size": 32, "max_train_steps": 1})
        for name, attention in (("finetune", "softmax"), ("align", "hedgehog"))
    ]  # fmt: skip
    for _ in range(2):  # the second time it is read
        conversion.convert(stages, tmp_path / "out")
    assert (tmp_path / "out" / "recipe.yaml").read_text().count("- 2\n") == 2


@pytest.mark.parametrize("left", ["null", "stages: 3", "stages: [align]", "[", "&a [*a]"])
def test_a_run_whose_recipe_is_damaged_is_told(convert, recipe, tmp_path, left):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text(left)
    with pytest.raises(UsageError, match="out/recipe.yaml.*(not what the run of a recipe writes|not readable as YAML)"):
        convert(recipe())


def test_another_recipe_in_the_same_folder_is_refused(convert, recipe, tmp_path):
    stages = [{"stage": "align", "max_train_steps": 1}]
    convert(recipe(stages=stages))
    with pytest.raises(UsageError, match="stage 1 has seed = None, not 1"):
        convert(recipe(stages=stages, seed=1))
    with pytest.raises(UsageError, match="a run of 1 stages, not 2"):
        convert(recipe(stages=[*stages, {"stage": "distill"}]))
    command = recipe()
    (tmp_path / "recipe.yaml").write_text("stages: [")
    with pytest.raises(UsageError, match=r"recipe\.yaml: not readable as YAML: .*line 1"):
        convert(command)


def attnswap(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["attnswap", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_from_a_recipe_to_a_model_card(convert, recipe, checkpoint, text, tmp_path, monkeypatch, capsys):
    """Half of the layers: their controls stand in the same ones."""
    convert(recipe(layers="1:"))
    out, measured, cards = tmp_path / "out", tmp_path / "report", tmp_path / "cards"
    sizes = "--context_length 32 --max_eval_tokens 256 --length 16 --rounds 1 --align_tokens 0".split()
    given = ["tradeoff", checkpoint, "--arm", out, "--train_file", text, "--block_size", "32", *sizes]
    assert attnswap(monkeypatch, *given, "--output_dir", measured) == 0
    found = report.read(measured / "report.json")
    arms = {arm.label: arm for arm in found.arms}
    where = "layers=1:3"
    asked = [
        "softmax", f"none:{where}", f"window:window=4,sinks=1,{where}", f"hedgehog:{where}", "hedgehog+window of out"
    ]  # fmt: skip
    assert [label for label in arms if label in asked] == asked
    # Windows of equal state and equal time, which depend on what was measured.
    assert arms.keys() - set(asked) <= {control.arm for arm in found.arms for control in arm.controls}
    arm = arms["hedgehog+window of out"]
    assert {a.status for a in arms.values()} == {"measured"} and arm.conversion == "out"
    assert [group.layers for label in asked for group in arms[label].swapped] == [[1, 2]] * 4
    assert arm.cost_class == "quadratic" and arm.cost.endswith(", softmax in 1 of 3 layers")
    assert [check.passed for check in arm.checks] == [True] * 5
    assert [(stage.stage, stage.size, stage.steps) for stage in arm.training] == [
        ("align", 96, 3), ("distill", 96, 3), ("finetune", 64, 4)
    ]  # fmt: skip
    assert arm.training_tokens == 256
    assert arm.training[0].first_loss == pytest.approx(read_log(out / "1_align")[0]["loss"], rel=5e-6)
    assert arm.training[1].trains.startswith("LoRA") and arm.training[1].text == "text.txt"
    assert {a.arm for a in arm.perplexity[0].against} == set(arms) - {"softmax", arm.label}
    assert str(tmp_path) not in (measured / "report.json").read_text()

    origin = ["--base_model", "org/base", "--license", "mit"]
    told = ["card", out, "user/mine", "--report", measured / "report.json", *origin]
    assert attnswap(monkeypatch, *told, "--output_dir", cards) == 0
    assert {path.name for path in cards.iterdir()} == {"README.md", "report.json", "recipe.yaml", "config.json"}
    card = (cards / "README.md").read_text()
    assert (
        "| finetune | all weights | text.txt | 64 | 4 |" in card and "All other attention layers keep softmax" in card
    )
    assert f"| window:window=4,sinks=1,{where} (control) |" in card and str(tmp_path) not in card
    again = yaml.safe_load((cards / "recipe.yaml").read_text())
    assert (again["model_name_or_path"], again["attention"], again["layers"]) == ("org/base", "hedgehog+window", "1:")
    assert [s["stage"] for s in again["stages"]] == ["align", "distill", "finetune"]
    assert "train_file" not in (cards / "recipe.yaml").read_text()
    assert "-m hf_attnswap.training --recipe recipe.yaml --train_file text.txt --output_dir converted" in card
    assert len(read_recipe(cards / "recipe.yaml", {"train_file": text})) == 3

    assert attnswap(monkeypatch, *told) == 0  # into the conversion, from where a push takes them
    capsys.readouterr()
    assert attnswap(monkeypatch, "push", out, "user/mine", "--dry_run", "--json") == 0
    assert {"README.md", "report.json", "recipe.yaml"} < set(json.loads(capsys.readouterr().out)["files"])


def test_a_conversion_that_has_not_ended_is_no_arm(convert, recipe, tmp_path, monkeypatch, capsys, checkpoint):
    convert(recipe(stages=[{"stage": "align"}]))
    model = tmp_path / "out" / "1_align" / "model"
    model.rename(tmp_path / "elsewhere")
    given = ["tradeoff", checkpoint, "--arm", tmp_path / "out", "--train_file", "t.txt", "--output_dir", tmp_path / "r"]
    assert attnswap(monkeypatch, *given) == 2
    assert "has not ended: 1_align has no model; give the command of its recipe again" in capsys.readouterr().err


def test_what_a_later_stage_cannot_train_is_refused_before_the_first_runs(convert, recipe, letters, tmp_path):
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    letters.save_pretrained(tmp_path / "encoder")
    with pytest.raises(UsageError, match="encoder' is a BertModel, which predicts no next tokens"):
        convert(recipe(model_name_or_path=str(tmp_path / "encoder"), attention="hedgehog", options=None))
    assert not (tmp_path / "out" / "1_align").exists()


def test_a_stage_whose_model_has_changed_is_not_done(convert, recipe, tmp_path):
    given = recipe(stages=[{"stage": "align", "max_train_steps": 1}])
    convert(given)
    config = tmp_path / "out" / "1_align" / "model" / "config.json"
    config.write_text(config.read_text().replace('"window": 4', '"window": 5'))
    with pytest.raises(UsageError, match="1_align/model' has changed since its stage wrote it: config.json is"):
        convert(given)
