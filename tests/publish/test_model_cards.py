"""The cards in model_cards/: written by the command from the JSON beside them, and from nothing else."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from card_numbers import strangers
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from hf_attnswap.publish import card
from hf_attnswap.report import Report, read, to_json
from hf_attnswap.training.options import words
from hf_attnswap.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))


@pytest.fixture(params=CARDS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def contents(folder: Path) -> tuple[str, Report, dict, str]:
    """The card, its report, its config.json, and the repository that it names."""
    text = (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    (repo_id,) = set(re.findall(r'(?:pipeline\("[\w-]+", |from_pretrained\()"([^"]+)"', text))
    return text, read(folder / "report.json"), config, repo_id


def test_there_are_cards():
    assert CARDS


def test_it_is_what_the_command_writes(folder):
    text, report, config, repo_id = contents(folder)
    data = ModelCard(text).data
    assert text == card.render(config, repo_id, report=report, base_model=data.base_model, licence=data.license)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == card.recipe(report, config, data.base_model)


def test_every_number_is_in_its_json(folder):
    text, report, config, repo_id = contents(folder)
    assert not strangers(text, report, config, repo_id, ModelCard(text).data.base_model)


def test_the_metadata_are_those_of_the_hub(folder):
    """As far as can be told without it: what reads a card there is in huggingface_hub."""
    text, report, config, repo_id = contents(folder)
    validate_repo_id(repo_id)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model_relation"] == "finetune" and re.fullmatch(r"[a-z0-9.-]+", metadata["license"])
    validate_repo_id(metadata["base_model"])
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == repo_id.split("/")[1] and results
    arms = to_json(report)["arms"]
    label = card.measured_arm(report, card.swapped_groups(config)).label
    (arm,) = [arm for arm in arms if arm["label"] == label]
    for result in results:
        assert json.dumps(result.metric_value) in json.dumps(arm)
    assert ModelCard(text).data.to_dict() == metadata


def test_the_recipe_is_one(folder, monkeypatch):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    if "script" not in recipe:
        assert len(read_recipe(folder / "recipe.yaml", {"train_file": "text.txt"})) == len(recipe["stages"])
        return
    assert recipe["script"] == "benchmarks/classify.py"
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    given = {key: value for key, value in recipe.items() if key != "script"}
    parsed = importlib.import_module("classify").parse([*words(given), "--output_dir", "out"])
    assert parsed.attention == recipe["attention"]


def test_nothing_is_left_open_and_no_path_of_one_machine(folder):
    for path in folder.iterdir():
        text = path.read_text()
        assert not re.search("more information needed|todo|placeholder", text, re.I), path
        assert not re.search(r"(?<![\w./:])/(tmp|home|root|work|mnt|Users)/", text), path
