"""Plans by key/value group: a swapped model whose layers run several variants does all that any swapped model does."""

import copy
import pickle

import pytest
import torch
from swapped_models import CLOSE, PADDED, greedy, left_padded, logits, plain, positions
from tiny_models import randomise, tokens
from transformers import AutoModelForCausalLM, BertConfig, BertModel, DynamicCache, T5Config, T5ForConditionalGeneration

import hf_attnswap
from hf_attnswap import SwapConfig, UsageError
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.integration.swapping import describe, softmax_groups
from hf_attnswap.sources.plans import read_plan, write_plan
from hf_attnswap.training.align import aligning, alignment_loss, calibrate, trainable_parameters

KEEP = ["0.1", "1.0", "2.0", "2.1"]  # of 3 layers with 2 groups each; layer 2 is left as it is
PLANS = {
    "window": SwapConfig("window", options={"window": 8, "sinks": 2}, keep=KEEP),
    "hedgehog+window": SwapConfig("hedgehog+window", options={"window": 8, "sinks": 2}, keep=KEEP),
    "relu_norm": SwapConfig("relu_norm", keep=KEEP),
    "several": SwapConfig(layers={"0.0": "elu", "1": {"attention": "window", "window": 8}, "2.1": "gated"}),
}
every_plan = pytest.mark.parametrize("plan", PLANS)


def swapped(plan: str, family: str = "llama"):
    return randomise(hf_attnswap.swap(plain(family), PLANS[plan]))


@every_plan
def test_generating_by_every_way_writes_what_a_recomputation_writes(plan):
    model, (ids, mask) = swapped(plan), left_padded()
    for how in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        settings = {key: value for key, value in how.items() if key != "cache_implementation"}
        cached = greedy(model, ids, mask, new=6, **how)
        recomputed = greedy(model, ids, mask, new=6, use_cache=False, **settings)
        torch.testing.assert_close(cached.logits, recomputed.logits, **CLOSE)
        assert torch.equal(cached.sequences, recomputed.sequences), how
    alone = greedy(model, ids[1:, PADDED:], new=6)
    assert torch.equal(cached.sequences[1:, PADDED:], alone.sequences)


@every_plan
def test_a_cache_goes_on_and_takes_tokens_back(plan):
    model, ids = swapped(plan), tokens(24)
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, :13], past_key_values=cache)]
    cache.activate_past_recording()
    parts.append(logits(model, ids[:, 13:21], past_key_values=cache))
    cache.crop(-3)
    parts[-1] = parts[-1][:, :5]
    parts += [logits(model, ids[:, at : at + 1], past_key_values=cache) for at in range(18, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_the_cache_holds_full_keys_of_kept_groups_and_the_window_of_others():
    model = swapped("window")
    sizes = []
    for length in (40, 80):
        cache = DynamicCache(config=model.config)
        logits(model, tokens(length), past_key_values=cache)
        sizes.append(cache_nbytes(cache))
    per_token = 2 * 8 * 8 * 2  # keys and values of 8 numbers, 8 bytes each, for two rows
    assert sizes[1] - sizes[0] == 40 * per_token * 4  # groups that keep softmax: four of six
    whole = 40 * per_token * 6
    assert sizes[0] < whole


@every_plan
def test_texts_packed_into_a_row_are_as_alone(plan):
    model, ids = swapped(plan), tokens(24)[:1]
    lengths = (11, 13)
    place = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(model, ids, position_ids=place, use_cache=False)
    alone = torch.cat([logits(model, part) for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@every_plan
def test_saved_copied_and_taken_off(plan, tmp_path):
    model, (ids, mask) = swapped(plan), left_padded()
    before = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for again in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert describe(again) == describe(model) and softmax_groups(again) == softmax_groups(model)
        found = logits(again, ids, attention_mask=mask, position_ids=positions(mask))
        assert torch.equal(found[mask.bool()], before[mask.bool()])
    original = logits(plain(), ids, attention_mask=mask, position_ids=positions(mask))
    found = logits(hf_attnswap.restore(model), ids, attention_mask=mask, position_ids=positions(mask))
    assert torch.equal(found[mask.bool()], original[mask.bool()])


def test_a_mixed_layer_aligns_its_new_parameters():
    model = hf_attnswap.swap(plain(), PLANS["hedgehog+window"])
    calibrate(model, tokens(24))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    history = []
    with aligning(model) as losses:
        for _ in range(8):
            loss = alignment_loss(model, tokens(24), losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    assert history[-1] < history[0]
    with aligning(model, linear_branch_alone=True) as losses:
        assert alignment_loss(model, tokens(24), losses).requires_grad


@pytest.mark.long
def test_torch_compile_takes_a_mixed_layer_whole():
    model, ids = swapped("window"), tokens(24)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        torch.testing.assert_close(
            compiled(ids, attention_mask=mask, use_cache=False).logits, model(ids).logits, **CLOSE
        )


def test_an_encoder_has_one_group_per_head():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config).double().eval()
    ids, mask = left_padded()
    original = model(ids % 64, attention_mask=mask).last_hidden_state
    hf_attnswap.swap(model, "sigmoid", keep=["0.0", "0.3", "1.2"])
    assert describe(model) == "sigmoid in 5 key/value groups of 2 layers, softmax in the other 3"
    found = model(ids % 64, attention_mask=mask).last_hidden_state
    assert not torch.allclose(found, original)
    hf_attnswap.restore(model)
    assert torch.equal(model(ids % 64, attention_mask=mask).last_hidden_state, original)


def test_cross_attention_by_groups():
    torch.manual_seed(0)
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).double().eval()
    hf_attnswap.swap(model, "elu", kinds=["cross"], keep=["0.1", "1.0", "1.3"])
    ids, mask = left_padded()
    cached, recomputed = (greedy(model, ids, mask, new=5, use_cache=use) for use in (True, False))
    torch.testing.assert_close(cached.logits, recomputed.logits, **CLOSE)


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_file_says_all_of_a_swap(plan, tmp_path):
    path = write_plan(tmp_path / "plan.yaml", PLANS[plan], plain(), "how it was made")
    read = read_plan(path)
    assert read.model == {"model_type": "llama", "layers": 3, "key_value_groups": 2}
    read.require(plain())
    found, expected = hf_attnswap.swap(plain(), read.swap), hf_attnswap.swap(plain(), PLANS[plan])
    assert found.config.attnswap == expected.config.attnswap
    with pytest.raises(UsageError, match="plan.yaml' was made for a model whose model_type is 'llama'"):
        read.require(plain("gpt2"))


EVERYTHING = [f"{layer}.{group}" for layer in range(3) for group in range(2)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(keep=["3.0"]), "keep has '3.0', but the model's attention layers are 0 to 2"),
        (dict(keep=["1.2"]), "keep has '1.2', but layer 1 has key/value groups 0 to 1"),
        (dict(keep=[1.2]), "keep has 1.2; expected layer.group, such as '18.2': write it as text, '1.2'"),
        (dict(keep=["1"]), "keep has '1'; expected layer.group"),
        (dict(keep="1.0"), "keep is '1.0'; expected a list of places"),
        (dict(keep=[]), "keep is empty"),
        (dict(keep=["1.1", "-2.1"]), "keep has '-2.1', which is named twice"),
        (dict(keep=EVERYTHING), "keeps every group on softmax"),
        (dict(keep=["1.1"], layers=[0]), "keep has '1.1', but layer 1 is not swapped"),
        (dict(layers={"0.0": {"attention": "elu", "window": 3}}), "elu has no option 'window'"),
        (dict(layers={0.1: "elu"}), "layers has 0.1; expected layer.group"),
        (dict(layers={"0.0": "elu", "0.1": "eluu"}), "Unknown attention 'eluu'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(given, said):
    model = plain()
    with pytest.raises(UsageError) as refused:
        hf_attnswap.swap(model, "window", **given)
    assert said in str(refused.value)
    assert describe(model) == "softmax" and not getattr(model.config, "attnswap", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attention: window\nkeep: [18.2]\n", "keep has 18.2; expected layer.group, such as '18.2': write it as text"),
        ("attention: window\nkeeps: ['0.0']\n", "unknown key 'keeps'"),
        ("- window\n", "expected keys such as attention and keep"),
        ("attention: 3\n", "attention is 3"),
        ("model: llama\n", "model is 'llama'"),
        ("attention: [\n", "not readable as YAML"),
    ],
)
def test_a_plan_file_that_says_something_else_is_refused(text, said, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_plan(path)
    assert said in str(refused.value) and "plan.yaml" in str(refused.value)


def test_no_such_plan_file():
    with pytest.raises(UsageError, match="plan 'nowhere.yaml' cannot be read"):
        read_plan("nowhere.yaml")
