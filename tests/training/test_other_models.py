"""Models that are no causal language models: a stage keeps their class, or says why it cannot train them."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import _SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.sources.conversions import find

WINDOW = ["--attention", "hedgehog"]
BERT = dict(_SIZES, intermediate_size=48)
LLAMA = dict(_SIZES, intermediate_size=48, num_key_value_heads=2)
SPEECH = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=16, max_target_positions=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
TRANSLATOR = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
)


@pytest.fixture
def saved(tmp_path, letters):
    """`saved("BertForMaskedLM", "bert", sizes)` is the folder of a tiny model of that class, with a tokenizer."""

    def save(name, family, sizes):
        torch.manual_seed(0)
        model = getattr(transformers, name)(AutoConfig.for_model(family, **sizes))
        model.save_pretrained(tmp_path / name)
        letters.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize(
    "name, family, sizes, more",
    [
        ("BertForSequenceClassification", "bert", BERT, []),
        ("BertForMaskedLM", "bert", BERT, ["--train", "attention", "--use_lora"]),
        ("BertModel", "bert", BERT, ["--train", "attention"]),
        ("LlamaForSequenceClassification", "llama", LLAMA | {"pad_token_id": None}, []),
    ],
)
def test_what_reads_text_is_aligned_and_keeps_its_class(train, arguments, saved, tmp_path, name, family, sizes, more):
    folder, output = saved(name, family, sizes), tmp_path / "out" / "model"
    train("align", [*arguments, *WINDOW, "--model_name_or_path", folder, *more])
    model = getattr(transformers, name).from_pretrained(output)
    assert model.config.architectures == [name]
    assert [module.swapped for module in hf_attnswap.inspect(model)] == ["hedgehog"] * 3
    before, after = (load_file(f"{path}/model.safetensors") for path in (folder, output))
    assert before.keys() <= after.keys()  # with the heads
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert bool(changed) == bool(more) and all("attention" in name for name in changed)


@pytest.mark.parametrize(
    "stage, name, family, sizes, message",
    [
        (
            "align",
            "WhisperForConditionalGeneration",
            "whisper",
            SPEECH,
            "reads speech, and stages train on one text",
        ),
        ("finetune", "WhisperForConditionalGeneration", "whisper", SPEECH, "reads speech, and .*Trainer"),
        ("align", "T5ForConditionalGeneration", "t5", TRANSLATOR, "makes another text of one, and stages"),
        ("align", "ViTForImageClassification", "vit", VISION, "reads images, and stages train on one text"),
        ("finetune", "BertForSequenceClassification", "bert", BERT, "predicts no next tokens.*use the stage align"),
        ("distill", "BertForMaskedLM", "bert", BERT, "is a BertForMaskedLM, which predicts no next tokens"),
        ("finetune", "LlamaModel", "llama", LLAMA, "is a LlamaModel, which predicts no next tokens"),
    ],
)
def test_what_a_stage_cannot_train_is_refused(train, arguments, saved, tmp_path, stage, name, family, sizes, message):
    folder = saved(name, family, sizes)
    with pytest.raises(UsageError, match=message):
        train(stage, [*arguments, *WINDOW, "--model_name_or_path", folder])
    assert not (tmp_path / "out").exists()


def test_a_teacher_predicts_next_tokens_too(train, arguments, saved):
    teacher = saved("BertForMaskedLM", "bert", BERT)
    with pytest.raises(UsageError, match=f"{teacher!r} is a BertForMaskedLM, which predicts no next tokens"):
        train("distill", [*arguments, "--attention", "relu", "--teacher_name_or_path", teacher])


def test_documents_apart_are_for_causal_models(train, arguments, saved):
    folder = saved("BertModel", "bert", BERT)
    with pytest.raises(UsageError, match="--separate_documents is for models that predict next tokens"):
        train("align", [*arguments, *WINDOW, "--model_name_or_path", folder, "--separate_documents"])


def test_a_flipped_bit_in_the_model_of_a_stage_is_told(train, arguments, checkpoint, tmp_path):
    """Where the next stage goes on from it, and where a recipe finds it done."""
    train("align", [*arguments, *WINDOW])
    aligned = tmp_path / "out" / "model"
    weights = aligned / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    more = ["--model_name_or_path", aligned, "--output_dir", tmp_path / "more"]
    with pytest.raises(UsageError, match="out/model' has changed since its stage wrote it: model.safetensors is not"):
        train("finetune", [*arguments, *more])
    with pytest.raises(UsageError, match="has changed since its stage wrote it"):
        train("distill", [*arguments, "--attention", "relu", "--teacher_name_or_path", aligned, *more[2:]])
    with pytest.raises(UsageError, match="has changed since its stage wrote it"):
        find(aligned)  # an arm of a comparison, a card, a push
    (tmp_path / "out" / "checksums.json").write_text("[]")
    with pytest.raises(UsageError, match="checksums.json' holds no checksums"):
        train("finetune", [*arguments, *more])
    (tmp_path / "out" / "checksums.json").unlink()
    assert find(aligned).folder == aligned
    train("finetune", [*arguments, *more])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "more" / "model")
