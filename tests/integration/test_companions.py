"""What lies beside the weights of a model travels with a conversion: generation_config, chat template, processor."""

import json

import pytest
from documented import make_inputs
from training_fixtures import _fresh_accelerator  # noqa: F401
from transformers import AutoTokenizer, GenerationConfig, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_attnswap import cli
from hf_attnswap.publish.push import prepare
from hf_attnswap.training import command as training

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def convert(monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["attnswap", "convert", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with `MODEL`, which generates in a way of its own and knows chats."""
    make_inputs(tmp_path)
    GenerationConfig(max_new_tokens=7, eos_token_id=[3, 4]).save_pretrained(tmp_path / "MODEL")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "MODEL")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("_fresh_accelerator")
def test_of_a_language_model(folder, monkeypatch):
    convert(monkeypatch, "MODEL", "--attention", "relu", "--output_dir", "converted")
    given = "--train_file book.txt --block_size 32 --max_train_steps 1 --output_dir out"
    training.main(["finetune", "--model_name_or_path", "converted", *given.split()])
    for saved in (folder / "converted", folder / "out" / "model"):
        read = GenerationConfig.from_pretrained(saved)
        assert (read.max_new_tokens, read.eos_token_id) == (7, [3, 4])
        assert AutoTokenizer.from_pretrained(saved).chat_template == TEMPLATE
        sent = {operation.path_in_repo for operation in prepare(saved, "user/name", base_model="none", licence="mit")}
        assert {"generation_config.json", "chat_template.jinja"} <= sent


def test_of_a_vision_model(tmp_path, monkeypatch):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    convert(monkeypatch, str(tmp_path / "vit"), "--attention", "relu", "--output_dir", str(tmp_path / "converted"))
    saved = json.loads((tmp_path / "converted" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 32, "width": 32}
