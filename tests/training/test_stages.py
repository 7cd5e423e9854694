"""The stages in this process: what they train and what they save."""

import json
import shutil

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_models import tokens
from tokenizers import processors
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.evaluation import __main__ as evaluation
from hf_attnswap.evaluation.perplexity import perplexity
from hf_attnswap.sources.models import load
from hf_attnswap.sources.texts import TextSource, token_blocks, token_stream
from hf_attnswap.training import loop, stage
from hf_attnswap.training.align import calibrate
from hf_attnswap.training.batches import batches
from hf_attnswap.training.stages import align

WINDOW = ["--attention", "hedgehog+window", "--option", "window=4", "--option", "sinks=1"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def read_log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens(24)).logits


@pytest.fixture
def trained(train, monkeypatch):
    """`trained(name, arguments)` runs a stage; the logits of the model that it hands to be saved."""

    def run(name, arguments):
        found, save = [], stage.save

        def look_and_save(args, accelerator, model, tokenizer):
            found.append(logits(model))
            return save(args, accelerator, model, tokenizer)

        monkeypatch.setattr(stage, "save", look_and_save)
        train(name, arguments)
        return found[0]

    return run


def test_alignment_saves_a_conversion_that_loads_as_any_model(trained, arguments, checkpoint, tmp_path, capsys):
    expected = trained("align", [*arguments, *WINDOW, "--layers", "1:"])
    folder = tmp_path / "out" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [module.swapped for module in hf_attnswap.inspect(model)] == [None, "hedgehog+window", "hedgehog+window"]
    assert torch.equal(logits(model), expected)
    files = {"model", "checksums.json", "stage.json", "training_log.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert load(str(folder))[1].decode([3, 1, 4]) == "a b"
    source, new = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict(), model.state_dict()
    assert changed(source, new) == set()
    assert all(new[name].any() for name in new.keys() - source.keys())
    assert "hedgehog+window in 2 layers, loss " in capsys.readouterr().out


def test_alignment_of_a_conversion_goes_on_from_its_parameters(train, arguments, tmp_path, monkeypatch):
    calibrated = []
    monkeypatch.setattr(align, "calibrate", lambda model, blocks: calibrated.append(blocks.shape))
    train("align", [*arguments, *WINDOW])
    aligned = str(tmp_path / "out" / "model")
    train("align", [*arguments, "--model_name_or_path", aligned, "--output_dir", str(tmp_path / "more")])
    first, more = (read_log(tmp_path / name) for name in ("out", "more"))  # on the same text in the same order
    assert more[0]["loss"] < first[0]["loss"]
    assert calibrated == [(2, 32)]  # the new swap, not the conversion
    with pytest.raises(UsageError, match="already swapped"):
        train("align", [*arguments, *WINDOW, "--model_name_or_path", aligned, "--output_dir", str(tmp_path / "again")])


def first_layer_error(model, checkpoint, blocks):
    """Of what its attention module gives, against the original's, on the same input."""
    outputs = []
    with torch.no_grad():
        for one in (model.eval(), AutoModelForCausalLM.from_pretrained(checkpoint)):
            module = one.model.layers[0].self_attn
            handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
            one(input_ids=blocks, use_cache=False)
            handle.remove()
    return (outputs[0] - outputs[1]).square().mean().item()


@pytest.mark.parametrize("more", [[], ["--use_lora", "--lora_r", "4"]])
def test_alignment_of_projections(trained, arguments, checkpoint, text, tmp_path, more):
    given = ["--attention", "relu_norm", "--option", "gain=true", "--train", "attention", "--learning_rate", "1e-2"]
    given += ["--max_train_steps", "40", "--per_device_train_batch_size", "2"]
    expected = trained("align", [*arguments, *given, *more])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(logits(model), expected)
    blocks = token_blocks(TextSource(text), load(checkpoint)[1], 32, 640)
    untrained = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(checkpoint), "relu_norm", gain=True)
    calibrate(untrained, blocks)
    assert first_layer_error(model, checkpoint, blocks) < 0.95 * first_layer_error(untrained, checkpoint, blocks)
    source = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    names = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(3) for name in "qkvo"}
    assert changed(source, model.state_dict()) == names


def test_documents_of_one_block_train_apart(train, arguments, tmp_path):
    """Where they are separate the loss of the first step is another, and all stages take the blocks."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": "abcdefghijklm"[i % 5 : 6 + i % 7]}) + "\n" for i in range(40)))
    arguments = [*arguments, "--train_file", str(path)]
    for name, more in (("finetune", []), ("distill", ["--attention", "relu"]), ("align", WINDOW)):
        for folder, option in (("joined", []), ("apart", ["--separate_documents"])):
            output = tmp_path / f"{name}_{folder}"
            train(name, [*arguments, *more, *option, "--max_train_steps", "2", "--output_dir", str(output)])
        joined, apart = (read_log(tmp_path / f"{name}_{folder}")[0]["loss"] for folder in ("joined", "apart"))
        assert joined != apart and apart > 0


def test_the_trainer_of_transformers_trains_a_swapped_model(checkpoint, text, tmp_path):
    """A swapped model is a model like any other: no callback, no subclass."""
    model, tokenizer = load(checkpoint)
    hf_attnswap.swap(model, "relu_norm")
    blocks = token_blocks(TextSource(text), tokenizer, 32)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tmp_path / "out", max_steps=4, learning_rate=1e-2, per_device_train_batch_size=1, save_strategy="no",
            report_to="none", use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [module.swapped for module in hf_attnswap.inspect(model)] == ["relu_norm"] * 3
    source = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert changed(source, model.state_dict()) == source.keys()


def test_finetuning_trains_all_weights_of_the_control(trained, arguments, checkpoint, tmp_path):
    expected = trained("finetune", [*arguments, "--learning_rate", "1e-2", "--max_train_steps", "20"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(logits(model), expected)
    source = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert changed(source, model.state_dict()) == source.keys()
    losses = [entry["loss"] for entry in read_log(tmp_path / "out")]
    assert sum(losses[10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_embeddings_stay_when_asked(train, arguments, checkpoint, tmp_path, name, capsys):
    """The tied output embeddings too; what trains is said."""
    given = [*arguments, "--attention", "relu_norm", "--option", "gain=true", "--learning_rate", "1e-2"]
    given += ["--new_parameters_learning_rate", "3e-2", "--freeze_embeddings"]
    train(name, given)
    source = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert source.keys() - changed(source, new) == {"model.embed_tokens.weight", "lm_head.weight"}
    embeddings = source["lm_head.weight"].numel()
    total = sum(p.numel() for p in load(str(tmp_path / "out" / "model"))[0].parameters())
    said = capsys.readouterr().err
    assert (
        f"{total - embeddings:,} of {total:,} parameters train: 12 of the swapped attention, "
        f"{total - embeddings - 12:,} of other weights\n" in said
    )
    log = read_log(tmp_path / "out")
    assert (log[0]["learning_rate"], log[0]["new_parameters_learning_rate"]) == (1e-2, 3e-2)


@pytest.mark.parametrize("name, more", [("finetune", ["--use_lora"]), ("distill", []), ("distill", ["--use_lora"])])
def test_gradient_checkpointing_has_the_same_losses(train, arguments, tmp_path, name, more):
    given = [*arguments, *WINDOW, *more, "--learning_rate", "1e-3"]
    train(name, given)
    train(name, [*given, "--gradient_checkpointing", "--output_dir", str(tmp_path / "again")])
    plain, again = ([entry["loss"] for entry in read_log(tmp_path / folder)] for folder in ("out", "again"))
    assert plain == again


def test_lora_on_a_conversion_is_merged_and_trains_the_new_parameters(trained, arguments, checkpoint, tmp_path):
    given = [*arguments, *WINDOW, "--use_lora", "--lora_r", "2", "--lora_dropout", "0.1", "--learning_rate", "1e-2"]
    expected = trained("finetune", given)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(logits(model), expected)
    source, new = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict(), model.state_dict()
    assert changed(source, new) == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(3) for name in "qkvo"
    }
    own = new.keys() - source.keys()
    assert own and all(".attnswap." in name and new[name].any() for name in own)


@pytest.mark.parametrize("rate, more", [("3e-3", []), ("5e-3", ["--use_lora", "--lora_r", "8"])])
def test_distillation_teaches_what_the_original_says(trained, arguments, checkpoint, text, tmp_path, rate, more):
    """The divergence from the original, measured apart from the training, becomes smaller."""
    given = [*arguments, "--attention", "relu_norm", "--learning_rate", rate, "--max_train_steps", "60", *more]
    expected = trained("distill", given)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(logits(model), expected)
    source = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = load(checkpoint)[1]
    blocks = token_blocks(TextSource(text), tokenizer, 32, 320)

    def divergence(model):
        with torch.no_grad():
            p, q = (m.eval()(input_ids=blocks).logits.log_softmax(-1) for m in (source, model))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    untrained = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(checkpoint), "relu_norm")
    assert divergence(model) < 0.9 * divergence(untrained)
    names = changed(source.state_dict(), model.state_dict())
    assert all("self_attn" in name for name in names) if more else names == source.state_dict().keys()


def test_distillation_by_a_named_teacher(train, arguments, checkpoint, tmp_path):
    """Of a model whose own weights have moved, the original has to be named."""
    train("finetune", [*arguments, "--attention", "relu_norm", "--learning_rate", "3e-2"])
    moved = ["--model_name_or_path", str(tmp_path / "out" / "model"), "--max_train_steps", "1"]
    for name, more in (("itself", []), ("named", ["--teacher_name_or_path", checkpoint])):
        train("distill", [*arguments, *moved, *more, "--output_dir", str(tmp_path / name)])
    itself, named = (read_log(tmp_path / name)[0]["loss"] for name in ("itself", "named"))
    assert named > itself > 0
    with pytest.raises(UsageError, match="is not swapped: give --attention"):
        train("distill", [*arguments, "--output_dir", str(tmp_path / "plain")])


def test_blocks_that_are_longer_than_learned_positions(train, arguments, save_tiny, tmp_path):
    given = [*arguments, *WINDOW, "--model_name_or_path", save_tiny("gpt2"), "--block_size", "513"]
    for name in ("align", "finetune"):
        with pytest.raises(UsageError, match="--block_size takes 513 tokens, and GPT2LMHeadModel has"):
            train(name, given)
    assert not (tmp_path / "out").exists()


def test_lora_finds_the_projections_of_another_family(train, arguments, save_tiny, tmp_path):
    """GPT-2 has other names and classes for them, and dropout by default."""
    folder = save_tiny("gpt2", attn_pdrop=0.1, resid_pdrop=0.1)
    train("finetune", [*arguments, *WINDOW, "--model_name_or_path", folder, "--use_lora"])
    source = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert changed(source, new) == {
        f"transformer.h.{layer}.attn.{name}.weight" for layer in range(3) for name in ("c_attn", "c_proj")
    }


RUNS = {
    "align": ("align", [*WINDOW, "--checkpointing_steps", "2"]),
    "finetune": ("finetune", ["--checkpointing_steps", "2"]),
    "projections": (
        "align",
        ["--attention", "relu_norm", "--train", "attention", "--checkpointing_steps", "2"],
    ),
    "distill": ("distill", ["--attention", "relu_norm", "--checkpointing_steps", "2"]),
    "lora": ("finetune", [*WINDOW, "--use_lora", "--lora_dropout", "0.2", "--checkpointing_steps", "2"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_resuming_ends_with_the_same_losses_and_weights(train, arguments, tmp_path, monkeypatch, name):
    stage, more = RUNS[name]
    arguments = [*arguments, *more, "--max_train_steps", "6", "--seed", "3"]
    train(stage, [*arguments, "--output_dir", str(tmp_path / "whole")])
    save_checkpoint = loop.save_checkpoint

    def cut(state, output_dir, run):
        save_checkpoint(state, output_dir, run)
        if len(run["losses"]) == 4:
            raise ConnectionError("power cut")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(loop, "save_checkpoint", cut)
        train(stage, arguments)
    assert not (tmp_path / "out" / "model").exists()
    train(stage, [*arguments, "--resume_from_checkpoint", "latest"])
    whole, resumed = tmp_path / "whole", tmp_path / "out"
    assert [entry["loss"] for entry in read_log(whole)] == [entry["loss"] for entry in read_log(resumed)]
    assert changed(weights(whole / "model"), weights(resumed / "model")) == set()
    with pytest.raises(UsageError, match="not empty"):
        train(stage, [*arguments, "--resume_from_checkpoint", "latest"])


def test_a_checkpoint_of_another_swap_is_refused(train, arguments, tmp_path):
    train("align", [*arguments, *WINDOW, "--checkpointing_steps", "4"])
    checkpoint = str(tmp_path / "out" / "checkpoints" / "step_4")
    given = ["--resume_from_checkpoint", checkpoint, "--output_dir", str(tmp_path / "other")]
    with pytest.raises(UsageError, match="of a run with option = "):
        train("align", [*arguments, *WINDOW, "--option", "window=8", *given])


def test_blocks_to_train_and_to_validate_on_begin_as_the_tokenizer_begins_a_text(
    train, arguments, checkpoint, text, tmp_path, monkeypatch
):
    """A checkpoint of a run that read without that token is of another text."""
    folder, seen, before = tmp_path / "model", [], tmp_path / "out" / "checkpoints" / "step_4"
    shutil.copytree(checkpoint, folder)
    monkeypatch.setattr(stage, "batches", lambda blocks, *more: seen.append(blocks) or batches(blocks, *more))
    monkeypatch.setattr(stage, "log_validation", lambda *told: seen.append(told[2]))
    arguments = [*arguments, "--model_name_or_path", folder, "--validation_file", text, "--checkpointing_steps", "4"]
    train("finetune", arguments)
    tokenizer = load(checkpoint)[1]
    begins = processors.TemplateProcessing(single="( $A", special_tokens=[("(", 60)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.save_pretrained(folder)
    train("finetune", [*arguments, "--output_dir", tmp_path / "more"])
    assert all(blocks.shape[1] == 32 for blocks in seen)
    assert [(blocks[:, 0] == 60).all().item() for blocks in seen] == [False] * 3 + [True] * 3
    with pytest.raises(UsageError, match="is of a run with text = "):
        train("finetune", [*arguments, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", before])


def test_tokens_are_counted_in_whole_steps(train, arguments, tmp_path):
    del arguments[arguments.index("--max_train_steps") :]
    more = ["--max_train_tokens", "300", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    train("finetune", [*arguments, *more])
    assert [entry["tokens"] for entry in read_log(tmp_path / "out")] == [128, 256]


def test_weights_in_low_precision_are_warned_of(train, arguments, tmp_path, capsys):
    train("finetune", [*arguments, "--dtype", "bfloat16"])
    assert "the weights that train are bfloat16, which loses updates" in capsys.readouterr().err
    train("finetune", [*arguments, "--output_dir", str(tmp_path / "float32")])
    assert "loses updates" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["align", "finetune"])
def test_mixed_precision(train, arguments, tmp_path, monkeypatch, name):
    """What `accelerate launch --mixed_precision bf16` asks for: bfloat16 computes, float32 trains and is saved."""
    train(name, [*arguments, *WINDOW, "--output_dir", str(tmp_path / "no")])
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(name, [*arguments, *WINDOW])
    exact, mixed = ([entry["loss"] for entry in read_log(tmp_path / folder)] for folder in ("no", "out"))
    assert mixed != exact and mixed == pytest.approx(exact, rel=0.05)
    saved = weights(tmp_path / "out" / "model").items()
    assert {tensor.dtype for name, tensor in saved if not name.endswith(".marker")} == {torch.float32}


@pytest.mark.long
@pytest.mark.parametrize("name, backend", [("align", "aot_eager"), ("distill", "aot_eager"), ("finetune", "inductor")])
def test_compiled_training_has_the_same_losses(train, arguments, tmp_path, monkeypatch, name, backend):
    """What `accelerate launch --dynamo_backend inductor` asks for; the graphs alone where that takes too long."""
    given = [*arguments, *WINDOW, "--learning_rate", "1e-3"]
    train(name, [*given, "--output_dir", str(tmp_path / "plain")])
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    train(name, given)
    plain, compiled = ([entry["loss"] for entry in read_log(tmp_path / folder)] for folder in ("plain", "out"))
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert weights(tmp_path / "out" / "model").keys() == weights(tmp_path / "plain" / "model").keys()


def test_evaluate(train, checkpoint, text, tmp_path, capsys):
    output = tmp_path / "perplexity.json"
    given = ["--model_name_or_path", checkpoint, "--validation_file", text, "--max_eval_tokens", "500"]
    evaluation.main([*given, "--context_length", "32", "--context_length", "300", "--output_file", str(output)])
    found = json.loads(output.read_text())
    assert (found["model"], found["attention"], found["text"]) == (checkpoint, "softmax", text)
    model, tokenizer = load(checkpoint)
    stream = token_stream(TextSource(text), tokenizer, 500)
    expected = perplexity(model, stream, 32)
    assert found["rows"][0] == {
        "context": 32, "perplexity": expected.perplexity, "nll": expected.mean,
        "standard_error": expected.standard_error, "tokens": 15 * 31,
    }  # fmt: skip
    assert (found["rows"][1]["standard_error"], found["rows"][1]["tokens"]) == (None, 299)
    table = capsys.readouterr().out
    assert f"{expected.perplexity:.4f}" in table and f"{expected.standard_error:.4f}" in table
