"""An adapter of a swapped model brings the swapped attention back, or refuses, wherever it was swapped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import randomise, tiny, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_attnswap
from hf_attnswap import UsageError

peft = pytest.importorskip("peft")
IDS = tokens(20)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return str(folder)


def lora(**more):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)


def trained(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(base: str, variant: str, way: str = "get_peft_model"):
    model = randomise(hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(base), variant))
    if way == "get_peft_model":
        return trained(peft.get_peft_model(model, lora()))
    model.add_adapter(lora())
    return trained(model)


LOADERS = {
    "peft": lambda base, folder: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    "peft on its base": lambda base, folder: peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder
    ),
    "peft without memory": lambda base, folder: peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, low_cpu_mem_usage=True
    ),
    "transformers": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
}


WAYS = [("hedgehog+window", "get_peft_model", loader) for loader in LOADERS] + [
    ("hedgehog+window", "add_adapter", "peft"),
    ("relu_power", "get_peft_model", "peft"),
    ("relu_power", "add_adapter", "transformers"),
    ("performer", "add_adapter", "peft without memory"),
    ("elu", "get_peft_model", "transformers"),
]


@pytest.mark.parametrize(("variant", "way", "loader"), WAYS)
def test_it_comes_back_on_the_attention_that_it_was_trained_with(base, variant, way, loader, tmp_path):
    model = adapted(base, variant, way)
    model.save_pretrained(tmp_path)
    again = LOADERS[loader](base, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(LOADERS[loader](base, tmp_path / "again")), logits(model), rtol=1e-4, atol=1e-4)


def test_checkpoints_of_a_trainer(base, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tokens(8, batch=2)]
    arguments = TrainingArguments(tmp_path, max_steps=2, save_steps=1, report_to=[], use_cpu=True, learning_rate=0.1)
    trainer = Trainer(adapted(base, "elu"), arguments, train_dataset=data)
    trainer.train()
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits(again), logits(trainer.model), rtol=1e-4, atol=1e-4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_on_a_conversion_and_merged(base, tmp_path):
    conversion = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(base), "hedgehog")
    randomise(conversion).save_pretrained(tmp_path / "one")
    model = trained(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), lora()))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.peft_config["default"].base_model_name_or_path == str(tmp_path / "one")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_other_attention_is_refused(base, tmp_path):
    adapted(base, "elu").save_pretrained(tmp_path)
    other = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(base), "relu")
    with pytest.raises(UsageError, match=r"other attention than the model has \(relu in 3 layers\)"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("way", ("get_peft_model", "add_adapter"))
def test_an_adapter_of_softmax_keeps_its_softmax(base, way, tmp_path):
    adapted(base, "elu").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    if way == "get_peft_model":
        model = peft.get_peft_model(model, lora())
    else:
        model.add_adapter(lora())
    before = logits(trained(model))
    with pytest.raises(UsageError, match="trained with swapped attention, and the model has 'default' on softmax"):
        model.load_adapter(tmp_path, adapter_name="swapped")
    assert torch.equal(logits(model), before) and "swapped" not in model.peft_config


@pytest.mark.parametrize("way", ("get_peft_model", "add_adapter"))
def test_two_adapters_have_one_set_of_variants(base, way, tmp_path):
    """Those of one conversion go together; one with other variants is refused, and changes nothing."""
    model = adapted(base, "hedgehog", way)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "same")
    randomise(model).save_pretrained(tmp_path / "other")
    if way == "get_peft_model":
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(base)
        loaded.load_adapter(tmp_path / "one", "default")
    loaded.load_adapter(tmp_path / "same", "same")
    loaded.set_adapter("default")
    before = logits(loaded)
    with pytest.raises(UsageError, match="'other' was trained with other parameters .* has with 'default', 'same'"):
        loaded.load_adapter(tmp_path / "other", adapter_name="other")
    assert sorted(loaded.peft_config) == ["default", "same"]
    assert torch.equal(logits(loaded), before)


def test_prompts_are_saved_on_a_conversion_alone(base, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(base), "elu")
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(UsageError, match="PROMPT_TUNING of a model that was swapped after it was loaded cannot be"):
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), config)
    model.save_pretrained(tmp_path / "prompts")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "prompts")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_without_a_swap_nothing_is_added(base, tmp_path):
    model = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(base), "elu")
    peft.get_peft_model(hf_attnswap.restore(model), lora()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and "attnswap" not in written


WITHOUT = """
import sys
sys.modules["hf_attnswap"] = None  # as where it is not installed
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
for load in (
    lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
    lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    lambda: AutoModelForCausalLM.from_pretrained(folder),
):
    try:
        load()
    except Exception as error:
        print(error)
    else:
        print("it loaded")
"""


def test_without_the_package_it_does_not_load(base, tmp_path):
    adapted(base, "elu").save_pretrained(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(hf_attnswap.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, base, tmp_path], capture_output=True, text=True, env=environment, timeout=300
    )
    said = run.stdout.splitlines()
    assert len(said) == 3 and all("pip install hf_attnswap" in line for line in said), run.stdout + run.stderr
