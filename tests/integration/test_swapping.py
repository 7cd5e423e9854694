"""What `swap`, `restore` and swapped models refuse: with the reason, and with the model left as it was."""

import copy
import re

import pytest
import torch
from tiny_models import tiny, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_attnswap
from hf_attnswap import SwapConfig, UsageError

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def made(auto, model_type, **settings):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **settings)).eval()


def bert():
    return made(AutoModel, "bert", **SIZES)


def t5():
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return made(AutoModelForSeq2SeqLM, "t5", **sizes)


def vit():
    return made(AutoModel, "vit", image_size=16, patch_size=8, **SIZES)


def bloom():
    return made(AutoModelForCausalLM, "bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)


def falcon():
    return made(AutoModelForCausalLM, "falcon", **SIZES)


def mamba():
    return made(AutoModelForCausalLM, "mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)


def gpt_oss():
    experts = dict(num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return made(AutoModelForCausalLM, "gpt_oss", **SIZES, **experts)


def gemma2():
    return made(AutoModelForCausalLM, "gemma2", **SIZES, num_key_value_heads=2, head_dim=8)


def jamba():
    experts = dict(num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)
    return made(AutoModelForCausalLM, "jamba", **SIZES, **experts, num_experts=1, mamba_d_state=4)


REFUSED = (
    (bloom, "relu", "BloomForCausalLM cannot be swapped: .* written out in the model's own file"),
    (falcon, "relu", "FalconForCausalLM cannot be swapped: .* written out in the model's own file"),
    (mamba, "relu", "MambaForCausalLM has no attention module that could be swapped"),
    (t5, "elu", "encoder.*has a bias on its scores, which elu cannot honour: relu"),
    (gpt_oss, "elu", "has learned sinks in its softmax, which elu cannot honour: relu"),
    (gemma2, "elu", "has a soft cap on its scores, which elu cannot honour: relu"),
    (bert, "window", "is bidirectional attention, and window is for causal attention only"),
    (vit, "elu+window", r"is bidirectional attention, and elu\+window is for causal attention only"),
)


def fingerprint(model):
    """All that a failed swap could have changed."""
    modules = [(name, len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    return model.config.to_dict(), model.config._attn_implementation, modules, weights


def assert_untouched(model, before) -> None:
    after = fingerprint(model)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(t, before[3][name]) for name, t in after[3].items())


@pytest.mark.parametrize(("make", "name", "reason"), REFUSED)
def test_models_that_cannot_be_swapped(make, name, reason):
    model = make()
    before = fingerprint(model)
    with pytest.raises(UsageError, match=reason) as error:
        hf_attnswap.swap(model, name)
    assert "\n" not in str(error.value)
    assert_untouched(model, before)
    found = hf_attnswap.inspect(model)
    assert bool(found) == (make is not mamba)
    assert all(entry.swapped is None for entry in found)
    assert all((entry.reason is not None) == (make in (bloom, falcon)) for entry in found)


def test_inspect_names_every_attention_module():
    found = hf_attnswap.inspect(t5())
    assert [(entry.kind, entry.layer) for entry in found] == [
        *(("bidirectional", 0), ("bidirectional", 1)),
        *(("causal", 0), ("cross", 0), ("causal", 1), ("cross", 1)),
    ]


def test_layers_without_attention_are_left_alone():
    """A hybrid of Mamba and attention: swapped where it has attention, or refused with a reason."""
    model, ids = jamba(), tokens(12)
    before, expected = fingerprint(model), model(ids, use_cache=False).logits
    try:
        hf_attnswap.swap(model, "elu")
    except UsageError as error:
        assert "cannot be swapped" in str(error)
        assert_untouched(model, before)
        return
    assert [entry.layer for entry in hf_attnswap.inspect(model)] == [1]
    assert not torch.equal(model(ids, use_cache=False).logits, expected)
    hf_attnswap.restore(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert_untouched(model, before)


def test_not_a_transformers_model():
    with pytest.raises(UsageError, match="Linear .*not a transformers model"):
        hf_attnswap.swap(torch.nn.Linear(2, 2), "relu")


@pytest.mark.parametrize(
    ("arguments", "says"),
    (
        (("hedghog",), "Unknown attention 'hedghog'. Did you mean 'hedgehog'?"),
        ((), "swap needs the name of an attention"),
        (("relu", [3]), "layers has 3, but the model's attention layers are 0 to 2"),
        (("relu", [-4]), "layers has -4, but the model's attention layers are 0 to 2"),
        (("relu", [0, "x"]), "layers has 'x'; expected an index or a slice such as '1::2'"),
        (("relu", [1.5]), "layers has 1.5; expected an index"),
        (("relu", [True]), "layers has True; expected an index"),
        (("relu", []), "layers is empty"),
        (("relu", {}), "layers is empty"),
        (("relu", "5:"), "layers '5:' selects none of the 3 layers"),
        (("relu", "1:x"), "layers is '1:x'; expected a slice such as '1::2'"),
        (("relu", "::0"), "layers is '::0'; expected a slice such as '1::2'"),
        (("relu", "1:2:3:4"), "layers is '1:2:3:4'; expected a slice such as '1::2'"),
        (("relu", [0, 0]), "layers names layer 0 twice"),
        (("relu", [0, -3]), "layers names layer 0 twice"),
        ((None, {0: "relu", ":2": "elu"}), "layers names layer 0 twice"),
        ((None, {0: "hedghog"}), "Unknown attention 'hedghog'"),
        ((None, {0: {"attention": "window", "windw": 3}}), "window has no option 'windw'"),
        ((None, {0: {"attention": "window", "window": 0}}), "window: window is 0; expected at least 1"),
        ((None, {0: 7}), "7"),
        ((SwapConfig("relu"), [0]), "swap takes either a SwapConfig or a name"),
        ((7,), "attention is 7; expected a name"),
    ),
    ids=str,
)
def test_wrong_use_leaves_the_model_as_it_was(arguments, says):
    model = tiny()
    before = fingerprint(model)
    with pytest.raises(UsageError, match=re.escape(says)):
        hf_attnswap.swap(model, *arguments)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    (
        ("window", {"windw": 8}, "window has no option 'windw'. Did you mean 'window'?"),
        ("relu", {"window": 8}, "relu has no option 'window'. Its options: gain, alpha"),
        ("window", {"window": -3}, "window: window is -3; expected at least 1"),
    ),
)
def test_wrong_options_leave_the_model_as_it_was(name, options, says):
    model = tiny()
    before = fingerprint(model)
    with pytest.raises(UsageError, match=re.escape(says)):
        hf_attnswap.swap(model, name, **options)
    with pytest.raises(UsageError):
        hf_attnswap.swap(model, layers={0: name}, **options)
    assert_untouched(model, before)


def test_already_swapped():
    model = hf_attnswap.swap(tiny(), "elu", layers=[0, 1])
    before = fingerprint(model)
    with pytest.raises(UsageError, match=r"already swapped \(elu in 2 layers\): call hf_attnswap.restore"):
        hf_attnswap.swap(model, "relu", layers=[2])
    assert_untouched(model, before)


def test_restore_of_what_was_never_swapped():
    model = tiny()
    before = fingerprint(model)
    with pytest.raises(UsageError, match="not swapped"):
        hf_attnswap.restore(model)
    assert_untouched(model, before)
    hf_attnswap.restore(hf_attnswap.swap(model, "relu"))
    with pytest.raises(UsageError, match="not swapped"):
        hf_attnswap.restore(model)


def test_swap_again_after_restore():
    model, ids = tiny(), tokens(12)
    hf_attnswap.restore(hf_attnswap.swap(model, "elu"))
    expected = hf_attnswap.swap(tiny(), "relu")(ids).logits
    torch.testing.assert_close(hf_attnswap.swap(model, "relu")(ids).logits, expected)


@pytest.mark.parametrize("name", ("relu", "hedgehog+window"))
def test_a_copy_is_a_model_of_its_own(name):
    model, ids = hf_attnswap.swap(tiny(), name, layers=[0, 2]), tokens(12)
    expected, copied = model(ids).logits, copy.deepcopy(model)
    torch.testing.assert_close(copied(ids).logits, expected)
    torch.testing.assert_close(hf_attnswap.restore(copied)(ids).logits, tiny()(ids).logits)
    assert torch.equal(model(ids).logits, expected)
    hf_attnswap.restore(model)


def test_two_models_do_not_know_of_each_other():
    one, other, ids = tiny(), tiny(), tokens(12)
    expected = other(ids).logits
    hf_attnswap.swap(one, "relu")
    assert torch.equal(other(ids).logits, expected)
    hf_attnswap.swap(other, "elu")
    hf_attnswap.restore(one)
    torch.testing.assert_close(one(ids).logits, expected)
    assert not torch.allclose(other(ids).logits, expected)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("name", ("relu", "elu+window", "softmax"))
@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
def test_changing_the_implementation_of_a_swapped_model_raises(implementation, name, layers):
    model = hf_attnswap.swap(tiny(), name, layers=layers)
    model.set_attn_implementation(implementation)
    says = f"layer {layers[0] if layers else 0} is swapped, but attn_implementation is '{implementation}'"
    with pytest.raises(RuntimeError, match=says):
        model(tokens(12))
    model.set_attn_implementation("attnswap")
    model(tokens(12))


def test_the_name_alone_swaps_nothing():
    model, ids = tiny(), tokens(12)
    expected = model(ids).logits
    model.set_attn_implementation("attnswap")
    try:
        torch.testing.assert_close(model(ids).logits, expected)
    except RuntimeError as error:
        assert "hf_attnswap.swap" in str(error)


def test_a_config_that_says_swapped_on_a_model_that_is_not_raises():
    config = hf_attnswap.swap(tiny(), "relu").config
    model = tiny()
    model.config.attnswap = config.attnswap
    model.set_attn_implementation("attnswap")
    with pytest.raises(RuntimeError, match="the module was not built by it: load the model with"):
        model(tokens(12))


@pytest.mark.parametrize("name", ("relu", "elu"))
def test_dropout_in_training_raises(name):
    model = hf_attnswap.swap(tiny(attention_dropout=0.1), name)
    model(tokens(12))
    with pytest.raises(NotImplementedError, match=r"layer 0 .*dropout 0.1 .*attention_dropout.* to 0"):
        model.train()(tokens(12))


@pytest.mark.parametrize(
    ("keyword", "says"),
    (
        ({"head_mask": torch.zeros(4)}, "head_mask .*a mask over heads"),
        ({"some_new_thing": 3}, "some_new_thing .*unknown to hf_attnswap"),
    ),
)
@pytest.mark.parametrize("layer", (0, 1))
def test_unknown_keyword_raises(keyword, says, layer):
    model = hf_attnswap.swap(tiny(), "relu", layers=[layer])
    where = "LlamaAttention" if layer else r"layer 0 \(relu\)"
    with pytest.raises(NotImplementedError, match=f"{where}: the model passes {says}"):
        model(tokens(12), **keyword)
    model(tokens(12), **dict.fromkeys(keyword))  # None says nothing


@pytest.mark.parametrize(
    ("keyword", "says"),
    (
        ({"softcap": 30.0}, "a soft cap of 30.0 on the scores"),
        ({"position_bias": torch.ones(1, 4, 12, 12)}, r"a bias of shape \(1, 4, 12, 12\) on the scores"),
        ({"s_aux": torch.ones(4)}, "learned sinks beside the scores"),
    ),
)
def test_what_changes_scores_is_honoured_or_refused(keyword, says):
    ids, plain = tokens(12), tiny()
    swapped = hf_attnswap.swap(tiny(), "relu_norm")
    assert not torch.equal(swapped(ids, **keyword).logits, swapped(ids).logits)
    with pytest.raises(NotImplementedError, match=rf"layer 0 \(elu\): cannot honour {says}"):
        hf_attnswap.swap(plain, "elu")(ids, **keyword)


@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
@pytest.mark.parametrize("name", ("relu", "elu", "window", "hedgehog+window"))
def test_output_attentions_are_the_weights(name, layers):
    ids = tokens(12)
    model = hf_attnswap.swap(tiny(), name, layers=layers)
    found = model(ids, output_attentions=True, use_cache=False).attentions
    assert [weights.shape for weights in found] == [(2, 4, 12, 12)] * 3
    softmax = tiny()
    softmax.set_attn_implementation("eager")
    softmax = softmax(ids, output_attentions=True).attentions
    assert all(not weights.triu(1).any() for weights in found)
    keeps = layers is not None or name.endswith("window")  # the window is wider than the text
    assert torch.allclose(found[0], softmax[0], atol=1e-6) == keeps
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and out.attentions is None


def test_output_attentions_of_a_state_raises():
    model = hf_attnswap.swap(tiny(), "elu")
    first = model(tokens(12), output_attentions=True)  # nothing is forgotten yet
    assert torch.equal(first.attentions[0], model(tokens(12), output_attentions=True, use_cache=False).attentions[0])
    with pytest.raises(NotImplementedError, match=r"layer 0 \(elu\): output_attentions .*use_cache=False"):
        model(tokens(1), past_key_values=first.past_key_values, output_attentions=True)


def test_new_parameters_follow_the_module():
    model = hf_attnswap.swap(tiny(dtype=torch.bfloat16).train(), "hedgehog+window")
    new = {n: p for n, p in model.named_parameters() if ".attnswap." in n}
    assert new and all(p.dtype == torch.bfloat16 and p.requires_grad for p in new.values())
    assert all(layer.self_attn.attnswap.training for layer in model.model.layers)
    assert not any(layer.self_attn.attnswap.training for layer in model.eval().model.layers)
