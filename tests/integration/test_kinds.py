"""Encoders, encoder-decoders, vision, audio, models of several parts: what is swapped in them, and that it is right."""

import pytest
import torch
from attention_cases import NAMES, SCALING, assert_near, build, crossed, gradients, inputs, mask_of, named
from device_under_test import DEVICE
from tiny_models import randomise, tokens
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

import hf_attnswap
from hf_attnswap import UsageError, attentions
from hf_attnswap.integration.swapping import describe, swapped_modules

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3)
TEXT = dict(vocab_size=64, pad_token_id=0, **SMALL)
SEQ2SEQ = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, forced_eos_token_id=None, attention_dropout=0.0,
)  # fmt: skip
MODELS = {
    "bert": dict(attention_probs_dropout_prob=0.0, **TEXT),
    "vit": dict(image_size=16, patch_size=4, **SMALL),
    "wav2vec2": dict(
        conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, **SMALL,
    ),
    "bart": SEQ2SEQ,
    "marian": SEQ2SEQ | dict(max_position_embeddings=64),
    "whisper": SEQ2SEQ | dict(num_mel_bins=8, max_source_positions=20, max_target_positions=64),
    "t5": dict(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=3.0, pad_token_id=0,
        decoder_start_token_id=1, eos_token_id=None, dropout_rate=0.0,
    ),
    "clip": dict(text_config=TEXT, vision_config=dict(image_size=16, patch_size=4, **SMALL)),
    "llava": dict(
        text_config=dict(model_type="llama", num_key_value_heads=2, **TEXT),
        vision_config=dict(model_type="clip_vision_model", image_size=16, patch_size=4, **SMALL),
        image_token_id=63,
    ),
}  # fmt: skip
LENGTH = 20
PADDED = torch.arange(LENGTH) < torch.tensor([[LENGTH], [13]])
EVERY_KIND = ("causal", "bidirectional", "cross")
BIDIRECTIONAL = named(lambda cls: "bidirectional" in cls.kinds)
EVERYWHERE = named(lambda cls: set(cls.kinds) == set(EVERY_KIND))
ANY_MASK = named(lambda cls: cls.any_mask)


def made(family: str, auto=AutoModel, **overrides):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(family, **MODELS[family] | overrides)).to(DEVICE).eval()


def batch(family: str) -> dict:
    """Inputs of two rows, the second padded where the model takes padding."""
    generator = torch.Generator().manual_seed(0)
    text = dict(input_ids=tokens(LENGTH).clamp(max=60), attention_mask=PADDED.long())
    images = dict(pixel_values=torch.randn(2, 3, 16, 16, generator=generator))
    decoder = dict(decoder_input_ids=tokens(9, seed=1))
    if family == "llava":
        text["input_ids"][:, 2:18] = 63  # 16 patches
    return {
        "vit": images,
        "wav2vec2": dict(input_values=torch.randn(2, 400, generator=generator)),
        "whisper": dict(input_features=torch.randn(2, 8, 40, generator=generator), **decoder),
        "clip": text | images,
        "llava": text | images,
    }.get(family) or (text | decoder if family in ("bart", "marian", "t5") else text)


@torch.no_grad()
def output(model, family: str) -> torch.Tensor:
    found = model(**batch(family))
    found = found.last_hidden_state if "last_hidden_state" in found else found.logits_per_text
    return found[PADDED] if family == "bert" else found


def names_for(family: str) -> list[str]:
    if family == "t5":
        return ANY_MASK
    return EVERYWHERE if family in ("bart", "marian", "whisper") else BIDIRECTIONAL


@pytest.mark.parametrize("family", MODELS)
def test_softmax_through_the_seam_is_the_model(family):
    model = made(family)
    expected = output(model, family)
    hf_attnswap.swap(
        model, "softmax", kinds=[k for k in EVERY_KIND if k in {e.kind for e in hf_attnswap.inspect(model)}]
    )
    torch.testing.assert_close(output(model, family), expected)


@pytest.mark.parametrize(("family", "name"), crossed(MODELS, [name for name in BIDIRECTIONAL if name != "softmax"]))
def test_swaps_saves_and_restores(family, name, tmp_path):
    if name not in names_for(family):
        pytest.skip("not for every kind of attention that the model has")
    model = made(family)
    expected = output(model, family)
    kinds = {entry.kind for entry in hf_attnswap.inspect(model)}
    randomise(hf_attnswap.swap(model, name, kinds=sorted(kinds)))
    assert {entry.swapped for entry in hf_attnswap.inspect(model)} == {name}
    found = output(model, family)
    assert found.isfinite().all() and not torch.allclose(found, expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any("attnswap" in key for keys in info.values() for key in keys)
    assert torch.equal(output(again.to(DEVICE).eval(), family), found)
    for each in (model, again):
        assert torch.equal(output(hf_attnswap.restore(each), family), expected)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_padding_of_an_encoder_changes_nothing(name):
    model, given = randomise(hf_attnswap.swap(made("bert"), name)), batch("bert")
    alone = model(input_ids=given["input_ids"][1:, :13]).last_hidden_state
    torch.testing.assert_close(model(**given).last_hidden_state[1:, :13], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("relu_norm", "elu"))
def test_cross_attention_only_when_asked(name):
    model = hf_attnswap.swap(made("bart"), name)
    assert describe(model) == f"{name} in 2 bidirectional layers, {name} in 2 layers"
    assert all(entry.swapped == (None if entry.kind == "cross" else name) for entry in hf_attnswap.inspect(model))
    model = hf_attnswap.swap(made("bart"), name, kinds="cross", layers=[1])
    assert list(swapped_modules(model)) == ["decoder.layers.1.encoder_attn"]
    with pytest.raises(UsageError, match="kinds has 'crossed'; expected some of causal, bidirectional, cross"):
        hf_attnswap.swap(made("bart"), name, kinds=["crossed"])
    with pytest.raises(UsageError, match="BertModel has no causal attention, only bidirectional"):
        hf_attnswap.swap(made("bert"), name, kinds=["causal"])


def test_parts_that_are_not_swapped_stay_as_they_are(tmp_path):
    model = hf_attnswap.swap(made("llava"), "elu+window", kinds=["causal"], window=4, sinks=1)
    assert {entry.part for entry in hf_attnswap.inspect(model) if entry.swapped} == {"text_config"}
    assert model.config.vision_config._attn_implementation == "sdpa"
    found = output(model, "llava")
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).to(DEVICE).eval()
    assert torch.equal(output(again, "llava"), found)
    assert again.config.vision_config._attn_implementation == "sdpa"
    assert {entry.part for entry in hf_attnswap.inspect(again) if entry.swapped} == {"text_config"}


def test_the_text_model_of_clip_is_causal():
    found = hf_attnswap.inspect(made("clip"))
    assert {(entry.part, entry.kind) for entry in found} == {
        ("text_config", "causal"),
        ("vision_config", "bidirectional"),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ("softmax", "relu_norm", "elu"))
def test_a_decoder_that_goes_by_its_mask_alone_is_causal(name):
    settings = SEQ2SEQ | dict(stagger_local_blocks=False, block_size=8, num_global_tokens=2)
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("pegasus_x", **settings)).to(DEVICE).eval()
    own = [module for module in model.modules() if getattr(module, "is_decoder", None) is True]
    assert len(own) == 4 and not any(module.is_causal for module in own)
    kinds = {entry.name: entry.kind for entry in hf_attnswap.inspect(model) if not entry.reason}
    assert kinds == {
        f"decoder.layers.{i}.{part}": kind
        for i in range(2)
        for part, kind in (("self_attn", "causal"), ("encoder_attn", "cross"))
    }
    given = dict(input_ids=tokens(16), decoder_input_ids=tokens(9, seed=1))
    expected = model(**given).last_hidden_state
    hf_attnswap.swap(model, name, kinds=["causal"])
    found = model(**given).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5) == (name == "softmax")
    given["decoder_input_ids"] = torch.cat([given["decoder_input_ids"][:, :6], tokens(3, seed=2)], dim=1)
    torch.testing.assert_close(model(**given).last_hidden_state[:, :6], found[:, :6])
    cache = None
    for i, ids in enumerate(given["decoder_input_ids"][:, :6].split(1, dim=1)):
        step = model(input_ids=given["input_ids"], decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.last_hidden_state[:, 0], found[:, i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kinds", (["causal"], ["causal", "bidirectional"], ["causal", "bidirectional", "cross"]), ids=str
)
@pytest.mark.parametrize(("family", "name"), crossed(("bart", "t5", "marian"), ("relu_norm", "elu", "hedgehog")))
def test_generation_of_encoder_decoders_is_recomputation(name, family, kinds):
    if name not in names_for(family):
        pytest.skip("a position bias is for variants on the scores")
    model = randomise(hf_attnswap.swap(made(family, AutoModelForSeq2SeqLM), name, kinds=kinds))
    given = {k: v for k, v in batch(family).items() if k != "decoder_input_ids"}
    for search in (dict(), dict(num_beams=3)):
        cached, whole = (
            model.generate(**given, max_new_tokens=12, do_sample=False, use_cache=cache, **search)
            for cache in (True, False)
        )
        assert torch.equal(cached, whole)


@pytest.mark.parametrize("term", ("bias", "softcap", "sinks", "all"))
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("name", [n for n in ANY_MASK if n != "none"])
def test_what_changes_the_scores(name, kind, term):
    """Against the definition, outputs and gradients, those of the bias and the sinks too."""
    from dataclasses import replace

    mask = mask_of(kind, 40, "left")
    generator = torch.Generator().manual_seed(4)
    terms = {
        "bias": torch.randn(1, 4, 40, mask.key_length, generator=generator, dtype=torch.float64, requires_grad=True),
        "softcap": 1.5,
        "sinks": torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True),
    }
    terms = terms if term == "all" else {term: terms[term]}
    mask = replace(mask, **terms)
    attention, given = build(name, 4, 2), inputs(40, 4, 2, key_length=mask.key_length)
    rows, wanted = (
        mask.new_tokens(),
        [*given, *attention.parameters(), *(t for t in terms.values() if torch.is_tensor(t))],
    )
    out, expected = attention(*given, mask, SCALING), attention.reference(*given, mask, SCALING)
    keep = torch.ones(2, 40).bool() if rows is None else rows
    assert_near(out.transpose(1, 2)[keep], expected.transpose(1, 2)[keep], 1e-9, "output")
    plain = attention(*given, mask_of(kind, 40, "left"), SCALING)
    # ReLA has no denominator that one more key could change.
    assert torch.allclose(out, plain) == (name == "rela" and term == "sinks")
    for ours, theirs in zip(gradients(out, wanted, rows), gradients(expected, wanted, rows), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_texts_packed_by_their_lengths(name):
    """cu_seq_lens_q, as DataCollatorWithFlattening gives it."""
    from tiny_models import tiny

    model, ids = randomise(hf_attnswap.swap(tiny(), name)), tokens(20, batch=1)
    ends, position_ids = (
        torch.tensor([0, 7, 20], dtype=torch.int32),
        torch.cat([torch.arange(7), torch.arange(13)])[None],
    )
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=13, max_length_k=13)
    with torch.no_grad():
        packed = model(ids, position_ids=position_ids, use_cache=False, **lengths).logits
        alone = [model(ids[:, part], use_cache=False).logits for part in (slice(0, 7), slice(7, 20))]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
        wrong = lengths | dict(cu_seq_lens_q=torch.tensor([0, 7, 19], dtype=torch.int32), cu_seq_lens_k=None)
        with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
            model(ids, position_ids=torch.arange(20)[None], use_cache=False, **wrong)


def test_cosformer_is_its_formula():
    attention, (query, key, value) = build("cosformer"), inputs(30)
    angle = torch.arange(30) * torch.pi / 2 / attention.max_length
    weights = torch.relu(query) @ torch.relu(key).mT * torch.cos(angle[:, None] - angle)
    for kind in ("causal", "bidirectional"):
        allowed = weights.tril() if kind == "causal" else weights
        expected = allowed / (allowed.sum(-1, keepdim=True) + attention.eps) @ value
        torch.testing.assert_close(attention(query, key, value, mask_of(kind, 30, "none"), SCALING), expected)


def test_cosformer_refuses_a_longer_text():
    attention = build("cosformer", max_length=256)
    with pytest.raises(NotImplementedError, match="a text of 257 tokens is longer than max_length=256"):
        attention(*inputs(257), mask_of("causal", 257, "none"), SCALING)


@pytest.mark.parametrize("name", ("performer", "taylor"))
def test_random_features_approximate_softmax(name):
    """Their kernel is exp(s) in the mean, so that more of them come nearer."""
    option = {"performer": "features", "taylor": "rank"}[name]
    query, key = (0.3 * torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    exact = torch.exp(query @ key.mT * SCALING)
    errors = []
    for size in (4, 512) if name == "performer" else (1, 64):
        made = attentions.get(name)(attentions.Heads(2, 2, 8), **{option: size}).to(DEVICE)
        found = made.kernel(query, key, SCALING)
        if name == "performer":  # queries are scaled by row
            found, target = found / found.sum(-1, keepdim=True), exact / exact.sum(-1, keepdim=True)
        else:
            target = exact
        errors.append((found - target).square().mean())
    assert errors[1] < errors[0] / 4


def test_rela_is_calibrated_to_the_size_of_softmax():
    attention, given = build("rela", dtype=torch.float32), inputs(60, dtype=torch.float32)
    mask = mask_of("causal", 60, "none")
    attention.calibrate(*given, mask, SCALING)
    softmax = attentions.get("softmax")(attention.heads)
    sizes = [a(*given, mask, SCALING).square().mean((0, 2, 3)).sqrt() for a in (attention, softmax)]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.2, atol=0)
