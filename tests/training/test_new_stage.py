"""A stage is one file, and each of its options is part of what a resumed run must share unless it says otherwise."""

import json
import sys
from dataclasses import fields

import pytest
import yaml

from hf_attnswap import UsageError
from hf_attnswap.training import command, recipe, stages

STAGE = '''
from dataclasses import dataclass
from typing import ClassVar

from hf_attnswap.training.loop import next_token_loss
from hf_attnswap.training.options import argument
from hf_attnswap.training.stage import Stage


@dataclass(kw_only=True)
class Sharpen(Stage):
    """The loss times a factor."""

    name: ClassVar[str] = "sharpen"
    factor: float = 1.0
    watched: int = argument(1, "what is watched alone", elsewhere=True)

    def loss(self, model, batch):
        return self.factor * next_token_loss(model, batch)

    def trains(self):
        return "all weights, sharpened"
'''


@pytest.fixture
def sharpen(tmp_path, monkeypatch):
    """The file of a stage in another folder on the package's path."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "sharpen.py").write_text(STAGE)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path / "more")])
    yield
    sys.modules.pop(f"{stages.__name__}.sharpen", None)
    vars(stages).pop("sharpen", None)


def test_a_stage_in_one_file_runs_by_name_and_in_a_recipe(sharpen, train, arguments, checkpoint, text, tmp_path):
    assert "sharpen    The loss times a factor." in command.overview()
    train("sharpen", arguments)
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["trains"] == "all weights, sharpened"
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"attention": "relu_norm", "stages": [{"stage": "sharpen", "factor": 3.0}]})
    )
    given = ["--model_name_or_path", checkpoint, "--train_file", text, "--block_size", "32", "--max_train_steps", "4"]
    train("--recipe", [tmp_path / "recipe.yaml", *given, "--output_dir", tmp_path / "converted"])
    assert json.loads((tmp_path / "converted" / "1_sharpen" / "stage.json").read_text())["options"]["factor"] == 3
    with pytest.raises(UsageError, match="unknown key 'faktor'. Did you mean 'factor'"):
        (tmp_path / "recipe.yaml").write_text("{attention: relu, stages: [{stage: sharpen, faktor: 3}]}")
        recipe.read_recipe(tmp_path / "recipe.yaml", {"model_name_or_path": "m"})


def test_an_option_of_a_new_stage_is_part_of_the_identity_of_a_run(sharpen, train, arguments, tmp_path):
    train("sharpen", [*arguments, "--factor", "2", "--checkpointing_steps", "4"])
    resumed = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoints" / "step_4"]
    with pytest.raises(UsageError, match="of a run with factor = 2.0, not 3.0"):
        train("sharpen", [*arguments, "--factor", "3", *resumed, "--output_dir", tmp_path / "other"])
    train("sharpen", [*arguments, "--factor", "2", "--watched", "5", *resumed, "--output_dir", tmp_path / "same"])


def test_another_stage_does_not_go_on_from_a_checkpoint(train, arguments, tmp_path):
    train("finetune", [*arguments, "--checkpointing_steps", "4", "--attention", "relu_norm"])
    resumed = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoints" / "step_4"]
    with pytest.raises(UsageError, match="is of a run with "):
        train("distill", [*arguments, "--attention", "relu_norm", *resumed, "--output_dir", tmp_path / "other"])


@pytest.mark.parametrize("words", [["aline"], ["aline", "--help"]])
def test_an_unknown_stage_is_one_line(words):
    with pytest.raises(UsageError, match="unknown stage 'aline'. Did you mean 'align'"):
        command.main(words)


def test_help_of_a_stage_lists_its_options(capsys):
    for name, stage in stages.available().items():
        with pytest.raises(SystemExit) as exit:
            command.main([name, "--help"])
        out = capsys.readouterr().out
        assert not exit.value.code and all(f"--{field.name}" in out for field in fields(stage))
        assert f"accelerate launch -m hf_attnswap.training {name} " in out
    command.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in [*stages.available(), *recipe.names()])
