"""Alignment: new parameters alone learn, layer by layer, from the softmax that flows on."""

import copy

import pytest
import torch
from accelerate import Accelerator
from tiny_models import randomise, tiny, tiny_encoder, tokens

from hf_attnswap import UsageError, restore, swap
from hf_attnswap.attentions import get
from hf_attnswap.config import MARKER
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.training.align import (
    DEFAULT_LEARNING_RATE,
    aligning,
    aligning_projections,
    alignment_loss,
    calibrate,
    projection_parameters,
    trainable_parameters,
    weights_divergence,
)
from hf_attnswap.training.batches import batches
from hf_attnswap.training.loop import train
from hf_attnswap.training.teacher import softmax_flows_on


def swapped(attention, layers=None):
    return swap(tiny(), attention, layers=layers, **({"window": 4, "sinks": 1} if "window" in attention else {}))


def layer_losses(model, text, **options):
    with torch.no_grad(), aligning(model, **options) as losses:
        alignment_loss(model, text, losses)
        modules = swapped_modules(model)
        return {modules[path].layer: loss.item() for path, loss in losses.items()}


# A map of 8 x 8 numbers per head has more to learn than one number per head.
@pytest.mark.parametrize(
    "attention, share", [("hedgehog", 0.95), ("hedgehog+window", 0.95), ("elu+window", 1), ("sigmoid", 1)]
)
def test_every_layer_comes_closer_to_softmax_and_only_new_parameters_change(attention, share):
    model = randomise(swapped(attention))
    text = tokens(48, batch=8)
    before, weights = layer_losses(model, text), copy.deepcopy(model.state_dict())
    parameters = trainable_parameters(model)
    with aligning(model) as losses:
        train(
            Accelerator(cpu=True),
            model,
            batches(text, 4, seed=0),
            lambda model, batch: alignment_loss(model, batch, losses),
            parameters=parameters,
            learning_rate=DEFAULT_LEARNING_RATE,
            steps=60,
        )
    after = layer_losses(model, text)
    assert before.keys() == after.keys() == {0, 1, 2}
    assert all(after[layer] < share * before[layer] for layer in after), (before, after)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {name for name, _ in model.named_parameters() if ".attnswap." in name}


@pytest.mark.parametrize("attention", ["hedgehog", "hedgehog+window", "elu+window", "relu_power"])
def test_softmax_flows_on_while_aligning(attention):
    text = tokens(48)
    with torch.no_grad():
        expected = tiny()(input_ids=text).logits
        model = randomise(swapped(attention))
        own = model(input_ids=text).logits
        with aligning(model):
            seen = model(input_ids=text).logits
        after = model(input_ids=text).logits
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    assert (own - expected).abs().max() > 0.1
    assert torch.equal(after, own)


def test_layers_do_not_disturb_each_other():
    """The loss of a layer is the same whether or not the layers before it are swapped too."""
    text = tokens(48)
    together = layer_losses(swapped("hedgehog+window"), text)
    alone = layer_losses(swapped("hedgehog+window", layers=[2]), text)
    assert alone == pytest.approx({2: together[2]}, rel=1e-4)


def test_gradients_reach_every_new_parameter_and_nothing_else():
    model = randomise(swapped("hedgehog+window"))
    parameters = trainable_parameters(model)
    with aligning(model) as losses:
        alignment_loss(model, tokens(48), losses).backward()
    assert parameters and all(p.grad.abs().max() > 0 for p in parameters)
    new = {id(p) for p in parameters}
    assert all(p.grad is None for p in model.parameters() if id(p) not in new)


def test_the_linear_branch_learns_alone():
    """The loss is that of the variant without its window, and the mix does not train."""
    model, text = randomise(swapped("hedgehog+window")), tokens(48)
    alone = swapped("hedgehog")
    for variant, whole in zip(swapped_modules(alone).values(), swapped_modules(model).values(), strict=True):
        variant.load_state_dict(whole.linear.state_dict(), strict=False)  # all but the marker
    parameters = trainable_parameters(model, linear_branch_alone=True)
    assert all(variant.log_mix.requires_grad is False for variant in swapped_modules(model).values())
    with aligning(model, linear_branch_alone=True) as losses:
        loss = alignment_loss(model, text, losses)
        loss.backward()
    assert loss.item() == pytest.approx(sum(layer_losses(alone, text).values()) / 3, rel=1e-5)
    assert parameters and all(p.grad.abs().max() > 0 for p in parameters)
    with pytest.raises(UsageError, match="hedgehog has no linear branch beside a window"):
        trainable_parameters(alone, linear_branch_alone=True)


def seen(model, text):
    """What the first swapped layer is called with: query, key, mask, scaling."""
    found = []
    with torch.no_grad(), softmax_flows_on(model, lambda *call: found.append((*call[3:5], *call[6:]))):
        model(**text if isinstance(text, dict) else {"input_ids": text})
    return found[0]


@pytest.mark.parametrize("attention", ["hedgehog", "hedgehog+window", "relu", "sigmoid", "softmax"])
def test_the_divergence_of_weights_is_that_of_its_definition(attention):
    """Rows of padding count for nothing; where a weight is zero and softmax's is not, it is large and finite."""
    model, text = randomise(swapped(attention)), tokens(24)
    query, key, mask, scaling = seen(model, text)
    variant = swapped_modules(model)["model.layers.0.self_attn"]
    p, w = (a.weights(query.double(), key.double(), mask, scaling) for a in (get("softmax")(variant.heads), variant))
    w = (w / w.sum(-1, keepdim=True).clamp(min=1e-8)).clamp(min=1e-8)
    expected = torch.where(p > 0, p * (p / w).log(), 0).sum(-1).mean().item()
    found = weights_divergence(variant, query, key, mask, scaling).mean()
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6) and (expected > 0.01) == (attention != "softmax")
    padded = torch.cat([text, torch.zeros(2, 5, dtype=torch.long)], 1)
    query, key, mask, scaling = seen(model, {"input_ids": padded, "attention_mask": (padded > 0).long()})
    assert weights_divergence(variant, query, key, mask, scaling).mean().item() == pytest.approx(
        expected, rel=1e-3, abs=1e-6
    )


@pytest.mark.parametrize("alone", [False, True])
def test_the_divergence_of_weights_becomes_smaller(alone):
    model, text = randomise(swapped("hedgehog+window")), tokens(48, batch=4)
    options = dict(linear_branch_alone=alone, weights_loss=2.0)
    before, outputs = layer_losses(model, text, **options), layer_losses(model, text, linear_branch_alone=alone)
    assert all(before[layer] > outputs[layer] for layer in before)
    parameters = trainable_parameters(model, alone)
    with aligning(model, **options) as losses:

        def loss(model, batch):
            return alignment_loss(model, batch, losses)

        loader = batches(text, 4, seed=0)
        train(Accelerator(cpu=True), model, loader, loss, parameters=parameters, learning_rate=1e-2, steps=10)
    after = layer_losses(model, text, **options)
    assert all(after[layer] < 0.95 * before[layer] for layer in before)


@pytest.mark.parametrize("attention", ["delta", "gelu"])
def test_negative_weights_have_no_divergence(attention):
    model = swapped(attention)
    with pytest.raises(UsageError, match=f"{attention} has negative weights, which have no cross-entropy"):
        layer_losses(model, tokens(24), weights_loss=1.0)


def with_gain(attention):
    return swap(tiny(), attention, gain=True)


@pytest.mark.parametrize("attention", ["relu", "relu_norm", "relu_power", "sigmoid"])
def test_a_gain_is_calibrated_by_least_squares(attention):
    model, text = with_gain(attention), tokens(48)
    before = layer_losses(model, text)
    calibrate(model, text)
    gains = [a.output_gain.detach().clone() for a in swapped_modules(model).values()]
    after = layer_losses(model, text)
    assert all(after[layer] <= before[layer] for layer in after)
    for factor in (0.97, 1.03):  # no other gain is better; the error is summed over the heads of a text
        for attention_, gain in zip(swapped_modules(model).values(), gains, strict=True):
            with torch.no_grad():
                attention_.output_gain.copy_(gain * factor)
        other = layer_losses(model, text)
        assert sum(other.values()) > sum(after.values())


def projection_losses(model, text):
    with torch.no_grad(), aligning_projections(model) as losses:
        alignment_loss(model, text, losses)
        return {path: loss.item() for path, loss in losses.items()}


@pytest.mark.parametrize("attention", ["relu_norm", "relu", "hedgehog"])
def test_projections_learn_what_the_softmax_module_gave(attention):
    model = swapped("hedgehog") if attention == "hedgehog" else with_gain(attention)
    text = tokens(48, batch=8)
    calibrate(model, text)
    with torch.no_grad():
        expected = tiny()(input_ids=text).logits
    before, weights = projection_losses(model, text), copy.deepcopy(model.state_dict())
    projection_parameters(model)

    def loss(model, batch):
        return alignment_loss(model, batch, losses)

    with aligning_projections(model) as losses:
        train(Accelerator(cpu=True), model, batches(text, 4, seed=0), loss, learning_rate=3e-3, steps=40)
        with torch.no_grad():
            seen = model(input_ids=text, use_cache=False).logits  # the copies have not learned
        after = alignment_loss(model, text, losses) and {path: loss.item() for path, loss in losses.items()}
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    assert len(after) == 3 and all(after[path] < 0.8 * before[path] for path in after), (before, after)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {name for name in weights if ".self_attn." in name and not name.endswith(f".{MARKER}")}
    assert not any(m._forward_hooks for m in model.modules())


def test_padding_counts_for_nothing_in_the_loss_of_modules():
    model, text = with_gain("relu_norm"), tokens(24)
    padded = torch.cat([text, torch.zeros(2, 8, dtype=torch.long)], dim=1)
    with aligning_projections(model) as losses:
        whole = alignment_loss(model, {"input_ids": text, "use_cache": False}, losses).item()
        inputs = {"input_ids": padded, "attention_mask": (padded > 0).long(), "use_cache": False}
        assert whole > 0 and alignment_loss(model, inputs, losses).item() == pytest.approx(whole, rel=1e-4)
        with pytest.raises(UsageError, match="pass use_cache=False"):
            model(input_ids=text)


def test_softmax_itself_has_nothing_to_learn():
    assert layer_losses(swapped("softmax"), tokens(48)) == pytest.approx({0: 0, 1: 0, 2: 0}, abs=1e-6)


def test_the_observers_go_when_something_fails():
    model = swapped("hedgehog")
    with pytest.raises(ZeroDivisionError), aligning(model):
        raise ZeroDivisionError
    assert not any(attention._answer for attention in swapped_modules(model).values())


@pytest.mark.parametrize("attention", ["relu", "relu_power", None])
def test_a_model_without_new_parameters_is_refused(attention):
    model = swapped(attention or "hedgehog")
    if attention is None:
        restore(model)
    with pytest.raises(UsageError, match="no parameters to align: train the projections around it"):
        trainable_parameters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_encoder_aligns_on_what_it_takes_by_name():
    """Padding counts for nothing in the loss."""
    model = randomise(swap(tiny_encoder(), "hedgehog"))
    text = tokens(24, batch=1)
    calibrate(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
    padded = torch.cat([text, torch.zeros(1, 8, dtype=torch.long)], dim=1)
    with aligning(model) as losses:
        whole = alignment_loss(model, {"input_ids": text}, losses)
        same = alignment_loss(model, {"input_ids": padded, "attention_mask": (padded > 0).long()}, losses)
        assert len(losses) == 3
    assert whole > 0 and same.item() == pytest.approx(whole.item(), rel=1e-4)
