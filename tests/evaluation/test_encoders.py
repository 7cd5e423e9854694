"""Masked models, classifiers and encoders are measured by what they predict, and never by next tokens."""

import json
import math

import pytest
import torch
from encoders import CLS, MASK, SEP, WORDS, bert, sentences, words_tokenizer
from tiny_models import tiny
from transformers import (
    AutoConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.evaluation.checks import check_swap
from hf_attnswap.evaluation.diagnose import diagnose
from hf_attnswap.evaluation.likeness import compare, likeness
from hf_attnswap.evaluation.predictions import NOTHING, masked, predicted
from hf_attnswap.evaluation.speech import word_errors
from hf_attnswap.evaluation.tasks import TaskInputs, quality_task, run_tasks
from hf_attnswap.evaluation.tasks.masked import draw_places, masked_likelihoods
from hf_attnswap.integration.objectives import learned_positions, objective, require_positions

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
T5 = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32)
VIT = ViTConfig(**{key: SMALL[key] for key in SMALL if key != "vocab_size"}, image_size=8, patch_size=4)
WHISPER = WhisperConfig(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=64,
    encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


def built(cls, config):
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: tiny(), "next tokens"),
        (lambda: bert(BertForMaskedLM), "masked tokens"),
        (lambda: bert(BertLMHeadModel), "masked tokens"),  # no decoder: it sees the next token
        (lambda: bert(BertLMHeadModel, is_decoder=True), "next tokens"),
        (lambda: bert(BertForSequenceClassification), "labels"),
        (lambda: built(LlamaForSequenceClassification, tiny().config), "labels"),
        (lambda: bert(BertModel), "vectors"),
        (lambda: bert(BertForMultipleChoice), "several inputs"),
        (lambda: built(T5ForConditionalGeneration, T5), "another text"),
        (lambda: built(ViTForImageClassification, VIT), "images"),
        (lambda: built(WhisperForConditionalGeneration, WHISPER), "speech"),
        (lambda: built(CLIPModel, CLIPConfig(text_config=SMALL, vision_config=SMALL)), "several inputs"),
    ],
)  # fmt: skip
def test_what_a_model_predicts(make, expected):
    assert objective(make()) == expected


@pytest.mark.parametrize(
    ("cls", "config", "limit"),
    [
        (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=24, vocab_size=32), 24),
        (OPTForCausalLM, OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                                   max_position_embeddings=24, vocab_size=32, word_embed_proj_dim=16), 24),
        (RobertaForMaskedLM, RobertaConfig(**SMALL, max_position_embeddings=26, pad_token_id=1), 24),
        (BertForMaskedLM, AutoConfig.for_model("bert", **SMALL, max_position_embeddings=24), 24),
    ],
)  # fmt: skip
def test_positions_that_were_learned_are_the_limit(cls, config, limit):
    model = cls(config).eval()
    assert learned_positions(model) == limit
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))
    require_positions(model, limit, "--length")
    with pytest.raises(UsageError, match=f"--length takes {limit + 1} tokens, and .* positions for {limit}"):
        require_positions(model, limit + 1, "--length")


def test_positions_that_are_computed_are_no_limit():
    assert learned_positions(tiny()) is None


def test_masked_likelihoods_by_hand():
    model, texts = bert(BertForMaskedLM), torch.tensor([[CLS, 5, 9, 7, SEP], [CLS, 8, 8, 11, SEP]])
    places = torch.tensor([[1, 3], [2, 3]])
    found = masked_likelihoods(model, texts, places, MASK, batch_size=3)
    for text, row in enumerate(places.tolist()):
        for number, place in enumerate(row):
            hidden = texts[text].clone()
            hidden[place] = MASK
            with torch.no_grad():
                said = model(input_ids=hidden[None]).logits[0, place].log_softmax(-1)
            assert found.log_likelihood[text, number].item() == pytest.approx(said[texts[text, place]].item(), rel=1e-4)
            assert found.right[text, number] == (said.argmax() == texts[text, place])


def test_special_tokens_are_never_asked_for():
    places = draw_places(50, range(1, 7), 3)
    assert places.shape == (50, 3) and places.min() == 1 and places.max() == 6
    assert all(len(set(row)) == 3 for row in places.tolist())
    assert draw_places(2, range(1, 3), 16).shape == (2, 2)


def test_the_task_of_masked_models():
    """A model that knows one word is right where that word was masked, and its texts begin and end as they should."""
    model, tokenizer, seen = bert(BertForMaskedLM), words_tokenizer(), []
    with torch.no_grad():
        model.cls.predictions.bias.zero_()
        model.cls.predictions.bias[5] = 100.0
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    stream = torch.tensor([5, 6] * 40)
    inputs = TaskInputs(lengths=[12], limit=4, tokens=stream)
    accuracy, pseudo = run_tasks(model, tokenizer, ["masked"], inputs)
    assert (accuracy.task, accuracy.metric, len(accuracy.scores)) == ("masked at 12", "accuracy", 4)
    assert accuracy.value == pytest.approx(0.5)  # 10 tokens of each text are masked in turn, half of them are 5
    assert pseudo.value > 1e10 and not pseudo.higher_is_better
    rows = torch.cat(seen)
    assert rows.shape == (40, 12) and (rows[:, 0] == CLS).all() and (rows[:, -1] == SEP).all()
    assert ((rows == MASK).sum(1) == 1).all()
    with pytest.raises(UsageError, match="task 'needle' is for models of next tokens, not of masked tokens; use"):
        run_tasks(model, tokenizer, ["needle"], inputs)


def test_likeness_by_hand():
    ours = {"labels": 2, "values": [[1.0, 0.0], [0.0, 2.0]]}
    agreement, cosine = compare(ours, {"labels": 2, "values": [[2.0, 0.0], [3.0, 0.0]]})
    assert agreement.scores == (1.0, 0.0) and cosine.scores == pytest.approx((1.0, 0.0))
    (cosine,) = compare({"labels": None, "values": [[1.0, 1.0]]}, {"labels": None, "values": [[1.0, 0.0]]})
    assert cosine.scores == pytest.approx((math.sqrt(0.5),))
    (far,) = compare({"labels": 1, "values": [[1.0]]}, {"labels": 1, "values": [[-0.5]]})
    assert (far.metric, far.scores, far.higher_is_better) == ("absolute difference", (1.5,), False)
    with pytest.raises(UsageError, match="other labels or sizes"):
        compare(ours, {"labels": 3, "values": [[1.0, 0.0, 0.0]] * 2})


@pytest.mark.parametrize("cls", (BertForSequenceClassification, BertModel))
def test_likeness_of_given_inputs(cls):
    """Padding that the mask hides counts for nothing; a model is like itself."""
    tokenizer = words_tokenizer()
    alone = [tokenizer(text, return_tensors="pt") for text in ("the cat sat", "dog ran far and out into the rain")]
    padded = [tokenizer(["the cat sat", "dog ran far and out into the rain"], padding=True, return_tensors="pt")]
    original, swapped = bert(cls), hf_attnswap.swap(bert(cls), "relu_norm")
    assert all(result.value == pytest.approx(1) for result in likeness(original, bert(cls), alone))
    one, many = likeness(swapped, original, alone), likeness(swapped, original, padded)
    assert one[-1].value < 0.999
    for a, b in zip(one, many, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-5)


def test_images_are_compared_on_given_inputs():
    model = ViTForImageClassification(VIT).eval()
    inputs = [{"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    assert [result.scores for result in likeness(model, model, inputs)] == [(1.0,) * 4, pytest.approx((1.0,) * 4)]


def test_word_errors_by_hand():
    found = word_errors(["a cat sat", "dogs ran off", ""], ["the cat sat down", "dogs ran off", "hm"])
    assert found.scores == ((2, 4), (0, 3), (1, 1)) and found.value == pytest.approx(3 / 8)


def test_what_has_no_logits_says_what_to_use():
    with pytest.raises(UsageError, match="QuestionAnsweringModelOutput has neither .*likeness.compare"):
        likeness(bert(BertForQuestionAnswering), bert(BertForQuestionAnswering), [{"input_ids": TEXT[None, :8]}])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (built(T5ForConditionalGeneration, T5), "writes another text than it reads: .*likeness"),
        (built(ViTForImageClassification, VIT), "reads images: .*likeness.* its processor"),
        (built(WhisperForConditionalGeneration, WHISPER), "reads sound: .*word_errors"),
    ],
)
def test_what_is_not_measured_says_what_to_use(model, says):
    with pytest.raises(UsageError, match=says):
        quality_task(model)


TEXT = torch.arange(48) % len(WORDS) + 5


@pytest.mark.parametrize("cls", (BertForMaskedLM, BertForSequenceClassification, BertModel))
@pytest.mark.parametrize("name", ("relu_norm", "elu"))
def test_a_sound_bidirectional_swap_passes_its_checks(cls, name):
    checks = check_swap(bert(cls), hf_attnswap.swap(bert(cls), name), TEXT)
    assert [check.name for check in checks] == ["padding", "definition", "seam"]
    assert all(check.passed for check in checks), checks


def test_a_broken_bidirectional_swap_fails(monkeypatch):
    model = hf_attnswap.swap(bert(BertForMaskedLM), "relu_norm")
    forward = model.bert.forward
    monkeypatch.setattr(model.bert, "forward", lambda *a, attention_mask=None, **kw: forward(*a, **kw))
    failed = [check.name for check in check_swap(bert(BertForMaskedLM), model, TEXT) if not check.passed]
    assert failed == ["padding"]


def test_what_masked_models_predict():
    blocks = torch.arange(40).view(2, 20) + 5
    read, labels = masked(blocks, MASK)
    assert ((read == MASK) == (labels != NOTHING)).all() and ((labels != NOTHING).sum(1) == 3).all()
    assert torch.equal(torch.where(labels == NOTHING, read, labels), blocks)
    assert predicted(tiny(), blocks, None) == (blocks, None)
    with pytest.raises(UsageError, match="its tokenizer has none for a mask"):
        predicted(bert(BertForMaskedLM), blocks, None)
    with pytest.raises(UsageError, match="predicts no tokens.*evaluate --control"):
        predicted(bert(BertModel), blocks, MASK)


def test_a_masked_model_is_diagnosed_by_what_it_predicts():
    model = hf_attnswap.swap(bert(BertForMaskedLM), "relu")
    blocks = TEXT[:40].view(2, 20)
    found = diagnose(model, blocks, mask_token_id=MASK)
    read, labels = masked(blocks, MASK)
    with torch.no_grad():
        logits = bert(BertForMaskedLM)(input_ids=read).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOTHING)
    assert found["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)
    assert all(layer["kl"] > 0 for layer in found["layers"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each class and its swap, in folders, with a text."""
    folder, tokenizer = tmp_path_factory.mktemp("encoders"), words_tokenizer()
    ViTForImageClassification(VIT).save_pretrained(folder / "images")
    for name, cls in (("masked", BertForMaskedLM), ("labels", BertForSequenceClassification), ("vectors", BertModel)):
        for suffix, model in (("", bert(cls)), ("_swapped", hf_attnswap.swap(bert(cls), "relu_norm"))):
            model.save_pretrained(folder / f"{name}{suffix}")
            tokenizer.save_pretrained(folder / f"{name}{suffix}")
    (folder / "text.txt").write_text(sentences())
    return folder


@pytest.mark.parametrize(
    ("name", "metrics"),
    [("masked", ["accuracy", "pseudo-perplexity"]), ("labels", ["agreement", "cosine"]), ("vectors", ["cosine"])],
)
def test_evaluate(attnswap, folders, name, metrics):
    line = [folders / f"{name}_swapped", "--control", folders / name, "--validation_file", folders / "text.txt"]
    result = attnswap("evaluate", *line, "--context_length", 16, "--limit", 8, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["perplexity"] == [] and [task["metric"] for task in found["tasks"]] == metrics
    assert all(task["items"] == 8 and task["difference"]["low"] is not None for task in found["tasks"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "evaluate {labels} --validation_file {text} --context_length 16",
            "compares a model with the original: name it by --control",
        ),
        ("evaluate {masked} --validation_file {text} --context_length 128", "has learned positions for 64"),
        ("evaluate {masked} --validation_file {text} --context_length 16 --stride 4", "--stride is for perplexity"),
        ("evaluate {images} --validation_file {text}", "reads images: compare it with the original"),
        (
            "diagnose {images} --attention relu --validation_file {text}",
            "reads images: compare it with the original by",
        ),
        ("diagnose {labels} --attention relu --validation_file {text} --context_length 16", "predicts no tokens"),
    ],
)
def test_wrong_use_is_one_line(attnswap, folders, line, says):
    given = {path.stem: str(path) for path in folders.iterdir()}
    result = attnswap(*line.format(**given).split())
    assert result.code == 2 and says in result.err and len(result.err.splitlines()) == 1, result.err
