"""The perplexity that stages log as they train, and the table of what runs of recipes keep."""

import json
import math
from types import SimpleNamespace

import pytest
import yaml
from training_fixtures import ROOT

from hf_attnswap import UsageError
from hf_attnswap.evaluation import __main__ as evaluation
from hf_attnswap.evaluation.processes import blocks_of_process
from hf_attnswap.report import types
from hf_attnswap.report.text import number
from hf_attnswap.training import stage as training_stage
from hf_attnswap.training.recipe import read_recipe

BLOCK = 32


def by_label(report):
    """The perplexity of each arm."""
    return {arm.label: arm.perplexity[0] for arm in report.arms}


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def held_out(tmp_path, text):
    path = tmp_path / "held_out.txt"
    path.write_text(open(text).read()[::-1])
    return str(path)


@pytest.fixture
def convert(train, checkpoint, text, held_out, tmp_path):
    """`convert("window")` is the folder of a finished run of a recipe for that variant."""

    def run(attention, name=None, steps=3, stages=({"stage": "distill"}, {"stage": "finetune"}), **options):
        recipe = {
            "model_name_or_path": checkpoint, "attention": attention, "options": options, "train_file": text,
            "validation_file": held_out, "validation_steps": 2, "max_validation_tokens": 4 * BLOCK,
            "block_size": BLOCK, "max_train_steps": steps, "learning_rate": 1e-2,
            "stages": list(stages),
        }  # fmt: skip
        path = tmp_path / f"{name or attention}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        folder = tmp_path / "runs" / (name or attention)
        train("--recipe", [path, "--output_dir", folder])
        return folder

    return run


def test_the_log_has_the_perplexity_at_the_start_on_the_way_and_at_the_end(convert, held_out, tmp_path):
    run = convert("relu_norm")
    found = {stage: entries(run / stage / "validation_log.jsonl") for stage in ("1_distill", "2_finetune")}
    for log in found.values():
        assert [(entry["step"], entry["tokens"]) for entry in log] == [(s, s * BLOCK) for s in (0, 2, 3)]
    assert found["2_finetune"][0]["perplexity"] == pytest.approx(found["1_distill"][-1]["perplexity"], rel=1e-5)
    report = tmp_path / "perplexity.json"
    evaluation.main(
        ["--model_name_or_path", str(run / "2_finetune" / "model"), "--validation_file", held_out,
         "--context_length", str(BLOCK), "--max_eval_tokens", str(4 * BLOCK), "--output_file", str(report)]
    )  # fmt: skip
    measured = json.loads(report.read_text())["rows"][0]["perplexity"]
    assert found["2_finetune"][-1]["perplexity"] == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("count, processes", [(1, 2), (3, 2), (4, 2), (5, 4)])
def test_processes_measure_every_block_in_equally_many_passes(count, processes):
    own = [
        blocks_of_process(SimpleNamespace(process_index=index, num_processes=processes), count)
        for index in range(processes)
    ]
    assert {block for blocks in own for block in blocks} == set(range(count))
    assert len({len(blocks) for blocks in own}) == 1


def test_a_run_that_goes_on_logs_each_step_once(train, checkpoint, text, held_out, tmp_path, monkeypatch):
    command = [
        "--model_name_or_path", checkpoint, "--train_file", text, "--block_size", str(BLOCK), "--max_train_steps", "4",
        "--validation_file", held_out, "--validation_steps", "1", "--max_validation_tokens", str(BLOCK),
        "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    seen = []

    def stop(*args):
        seen.append(args[4])  # the step
        if seen[-1] == 3:
            raise KeyboardInterrupt
        return log(*args)

    log = training_stage.log_validation
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_stage, "log_validation", stop)
        train("finetune", command)
    train("finetune", command)
    assert [entry["step"] for entry in entries(tmp_path / "out" / "validation_log.jsonl")] == [0, 1, 2, 3, 4]


def test_the_table_compares_each_stage_with_its_control(convert, script, held_out, tmp_path, monkeypatch):
    runs = [convert("softmax"), convert("window", window=4, sinks=1), convert("relu_norm")]
    quality = script("benchmarks/quality")
    command = [*map(str, runs), "--validation_file", held_out, "--context_length", str(BLOCK), "--max_eval_tokens",
               str(8 * BLOCK), "--output_dir", str(tmp_path / "table")]  # fmt: skip
    models = by_label(quality.main(command))
    assert list(models) == ["original", *(f"{run.name}/{stage}" for run in runs for stage in ("distill", "finetune"))]

    def factor(ours, control):
        nll = [models[key].block_nll for key in (ours, control)]
        return math.exp(sum(a - b for a, b in zip(*nll, strict=True)) / 8)

    for key, control in {
        "softmax/distill": "original", "relu_norm/distill": "original", "relu_norm/finetune": "softmax/finetune",
    }.items():  # fmt: skip
        ratio = models[key].ratio
        assert (ratio.arm, ratio.items, ratio.value) == (control, 8, pytest.approx(factor(key, control)))
    (beside,) = models["relu_norm/finetune"].against
    assert beside.arm == "window/finetune"
    assert beside.value == pytest.approx(factor("relu_norm/finetune", "window/finetune"))
    assert models["softmax/finetune"].ratio is None and not models["window/distill"].against
    page = (tmp_path / "table" / "report.md").read_text()
    ratio = models["relu_norm/finetune"].ratio
    assert f"×{number(ratio.value)} ({number(ratio.low)}–{number(ratio.high)})\\*" in page
    assert "| relu_norm/finetune | " in page and "softmax/finetune |" in page
    assert (
        yaml.safe_load((tmp_path / "table" / "window" / "recipe.yaml").read_text())["stages"][0]["stage"] == "distill"
    )

    def not_again(*args):
        raise AssertionError("measured twice")

    monkeypatch.setattr(quality, "measured", not_again)
    again = by_label(quality.main(command))
    assert list(again) == list(models)
    for key, entry in again.items():
        assert entry.block_nll == pytest.approx(models[key].block_nll) and entry.tokens == models[key].tokens
    with pytest.raises(UsageError, match="other text"):
        quality.main([*command[:-1], str(tmp_path / "table"), "--max_eval_tokens", str(4 * BLOCK)])


@pytest.mark.long
def test_a_run_trained_otherwise_is_no_control(convert, script, held_out, tmp_path):
    runs = [convert("softmax"), convert("window", window=4, sinks=1), convert("relu_norm", "longer", steps=4)]
    command = [*map(str, runs), "--validation_file", held_out, "--context_length", str(BLOCK), "--max_eval_tokens",
               str(2 * BLOCK), "--output_dir", str(tmp_path / "table")]  # fmt: skip
    models = by_label(script("benchmarks/quality").main(command))
    assert (
        models["longer/distill"].ratio.arm == "original" and models["window/finetune"].ratio.arm == "softmax/finetune"
    )
    assert not models["longer/distill"].against
    assert models["longer/finetune"].ratio is None and not models["longer/finetune"].against
    page = (tmp_path / "table" / "report.md").read_text()
    assert "| - | - | measured |" in page.split("| longer/finetune |")[1].split("\n")[0]
    assert "an interval needs 8 blocks, there are 2" in page


@pytest.mark.long
def test_softmax_that_was_trained_before_the_swap_is_the_teacher(convert, script, held_out, tmp_path):
    def stages(attention):
        return [{"stage": "finetune"}, {"stage": "distill", "attention": attention}, {"stage": "distill"}]

    runs = [convert("softmax", name, stages=stages(name)) for name in ("window", "relu_norm")]
    command = [*map(str, runs), "--validation_file", held_out, "--context_length", str(BLOCK), "--max_eval_tokens",
               str(2 * BLOCK), "--output_dir", str(tmp_path / "table")]  # fmt: skip
    report = script("benchmarks/quality").main(command)
    models, arms = by_label(report), {arm.label: arm for arm in report.arms}
    assert arms["relu_norm/finetune"].attention == "softmax" and arms["relu_norm/distill"].attention == "relu_norm"
    for stage in ("distill", "distill 2"):
        found = models[f"relu_norm/{stage}"]
        for compared, control in ((found.ratio, "relu_norm/finetune"), (found.against[0], f"window/{stage}")):
            factor = math.exp(sum(a - b for a, b in zip(found.block_nll, models[control].block_nll, strict=True)) / 2)
            assert (compared.arm, compared.value) == (control, pytest.approx(factor))
    assert [arms[f"relu_norm/{stage}"].training_tokens for stage in ("distill", "distill 2")] == [6 * BLOCK, 9 * BLOCK]


def test_what_is_no_finished_run_is_refused(script, tmp_path, held_out):
    (tmp_path / "run").mkdir()
    rest = ["--validation_file", held_out, "--output_dir", str(tmp_path / "table")]
    with pytest.raises(UsageError, match="no recipe.yaml"):
        script("benchmarks/quality").main([str(tmp_path / "run"), *rest])
    (tmp_path / "run" / "recipe.yaml").write_text("stages: [{stage: finetune, model_name_or_path: x}]")
    with pytest.raises(UsageError, match="has not finished"):
        script("benchmarks/quality").main([str(tmp_path / "run"), *rest])


RUNS = sorted((ROOT / "benchmarks" / "results" / "quality").glob("*/recipe.yaml"))


@pytest.mark.parametrize("record", RUNS, ids=lambda path: path.parent.name)
def test_the_recipes_of_the_table_are_those_of_its_runs(record):
    """But for the model and the texts, which they take as arguments."""
    given = {"model_name_or_path": "m", "train_file": "t.txt", "validation_file": "v.txt"}

    def without_paths(stages):
        return [{key: value for key, value in stage.items() if key not in given} for stage in stages]

    stages = read_recipe(ROOT / "benchmarks" / "recipes" / f"{record.parent.name}.yaml", given)
    ran = yaml.safe_load(record.read_text())["stages"]
    assert without_paths([{"stage": name, **options} for name, options in stages]) == without_paths(ran)


def arm_of(attention, window=None, stage="distill", tokens=64):
    """An arm as `quality.measured` makes it, of a run with one stage."""
    options = {} if window is None else {"window": window, "sinks": 4}
    stages = [
        types.Stage(stage, "", "text", tokens, 2, 1e-3, arguments={"attention": attention, "max_train_tokens": tokens})
    ]
    group = types.Group(attention, options, [0, 1])
    nll = [1.0 + 0.1 * number for number in range(10)]
    return types.Arm(
        label=f"{attention}{window or ''}", attention=attention, options=options, control=attention == "window",
        formula="", cost="", cost_class="linear", source="", new_parameters=0, status="measured", swapped=[group],
        training=stages, perplexity=[types.Perplexity(32, 4.0, 1.45, None, 64, block_nll=nll)],
    )  # fmt: skip


def test_the_window_of_equal_state_is_the_run_that_was_trained_alike(script):
    quality = script("benchmarks/quality")
    arms = {
        "original": arm_of("softmax"), "elu/distill": arm_of("elu"), "w/distill": arm_of("window", 8),
        "wide/distill": arm_of("window", 40), "more/distill": arm_of("window", 40, tokens=128),
    }  # fmt: skip
    arms["original"].training = []
    windows = {
        "elu/distill": [{"equal": equal, "window": wide, "sinks": 4} for equal, wide in (("state", 41), ("time", 96))]
    }
    quality.compare(arms, windows)
    state, time = arms["elu/distill"].controls
    assert (state.equal, state.arm, state.note) == ("state", "wide/distill", None)
    assert time.arm is None and time.note == "no run is that of window with window=96, sinks=4, trained alike"
    assert [found.arm for found in arms["elu/distill"].perplexity[0].against] == ["w/distill", "wide/distill"]
    quality.compare(arms, {"elu/distill": [{"equal": "time", "arm": "softmax", "note": "slower"}]})
    assert arms["elu/distill"].controls == [types.Control("time", "original", "slower")]


def test_a_plan_by_window_is_not_the_window_of_others(script):
    quality = script("benchmarks/quality")
    arms = {"plan/distill": arm_of("window", 8), "elu/distill": arm_of("elu")}
    arms["plan/distill"].swapped[0].groups = ["1.0"]
    quality.compare(arms, {})
    assert arms["elu/distill"].perplexity[0].against == []
    arms["plan/distill"].swapped[0].groups = None
    quality.compare(arms, {})
    assert [found.arm for found in arms["elu/distill"].perplexity[0].against] == ["plan/distill"]
