"""Gradients, distributions and the damage of single layers, against autograd, softmax and whole swaps."""

import json
import math

import pytest
import torch
from tiny_models import tiny, tokens
from torch import nn

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.attentions import Heads, get
from hf_attnswap.evaluation.damage import by_damage, layer_damage, least_damaged
from hf_attnswap.evaluation.diagnose import diagnose
from hf_attnswap.evaluation.distribution import distribution_facts, weight_facts
from hf_attnswap.evaluation.gradients import dead_and_saturated, gradient_flow
from hf_attnswap.integration.observing import answering, softmax
from hf_attnswap.masks import Mask

HEADS = Heads(1, 1, 2)
EVERY = ("softmax", "relu", "relu_norm", "relu_power", "sigmoid", "elu", "hedgehog", "elu+window", "window", "delta")


def scores_of(*rows):
    """Query and key whose products are these scores: the keys are unit vectors."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    return matrix[None, None], torch.eye(matrix.shape[1], dtype=torch.float64)[None, None]


def test_facts_of_weights_by_hand():
    weights = torch.tensor([[0.5, 0.5, 0, 0], [0.6, -0.2, 0.2, 0], [0, 0, 0, 1.0]])[None, None]
    mask = Mask(3, 4, causal=False)
    facts = {name: x[0, 0].tolist() for name, x in weight_facts(weights, mask).items()}
    assert facts["row_sum"] == pytest.approx([1, 0.6, 1])
    assert facts["negative"] == pytest.approx([0, 0.2, 0])
    mixed = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2))
    assert facts["entropy"] == pytest.approx([math.log(2), mixed, 0])
    assert facts["effective_keys"] == pytest.approx([2, math.exp(mixed), 1])
    assert facts["sparsity"] == pytest.approx([0.5, 0.25, 0.75])


def test_rows_and_keys_that_are_masked_count_for_nothing():
    valid = torch.tensor([[False, True, True]])
    facts = weight_facts(torch.ones(1, 1, 3, 3), Mask(3, 3, valid))
    assert facts["rows"][0, 0].tolist() == [False, True, True]
    assert facts["effective_keys"][0, 0, 1:].tolist() == pytest.approx([1, 2])
    assert facts["sparsity"].sum() == 0


class Fixed(get("softmax")):
    """Attention with the weights that it is given, whatever query and key are."""

    def given(self, matrix):
        self.matrix = torch.tensor(matrix, dtype=torch.float64)
        return self

    def weights(self, query, key, mask, scaling):
        return self.matrix.expand(*query.shape[:2], *self.matrix.shape)

    def forward(self, query, key, value, mask, scaling, state=None):
        groups = query.shape[1] // value.shape[1]
        return self.weights(query, key, mask, scaling) @ value.double().repeat_interleave(groups, 1)


def test_a_layer_beside_softmax_by_hand():
    """Queries of 0 make softmax the mean over the keys so far; against that, row by row."""
    model = hf_attnswap.swap(tiny(), "softmax", layers=[0])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    (attention,) = hf_attnswap.integration.swapping.swapped_modules(model).values()
    attention.__class__ = Fixed
    attention.given([[2.0, 0, 0, 0], [1, -1, 0, 0], [0.5, 0.5, 0.5, 0], [0, 0, 0, 0]])
    seen = []
    with answering(model, lambda *call: (seen.append(call[4]), softmax(*call))[1]):
        model(tokens(4, batch=1))
    value = seen[0].double().repeat_interleave(2, 1)  # two query heads share each
    (facts,) = distribution_facts(model, tokens(4, batch=1))
    assert facts.row_sum.tolist() == pytest.approx([(2 + 0 + 1.5 + 0) / 4] * 4)
    assert facts.row_sum_spread.tolist() == pytest.approx([torch.tensor([2.0, 0, 1.5, 0]).std(correction=0).item()] * 4)
    assert facts.negative.tolist() == pytest.approx([0.5 / 4] * 4)
    # 1 against 1; 1/2, -1/2 against 1/2, 1/2; a third each, twice; nothing against a quarter each.
    assert facts.distance.tolist() == pytest.approx([(0 + 1 + 0 + 1) / 2 / 4] * 4)
    soft = [0, math.log(2), math.log(3), math.log(4)]
    assert facts.softmax_entropy.tolist() == pytest.approx([sum(soft) / 4] * 4)
    assert facts.softmax_effective_keys.tolist() == pytest.approx([(1 + 2 + 3 + 4) / 4] * 4)
    assert facts.effective_keys.tolist() == pytest.approx([(1 + 2 + 3 + 0) / 4] * 4)
    first, second, third = (value[:, :, i] for i in range(3))
    ours = torch.stack([2 * first, first - second, (first + second + third) / 2, 0 * first])
    mean = torch.stack([value[:, :, : i + 1].mean(2) for i in range(4)])
    expected = [(ours[a:b].norm() / mean[a:b].norm()).item() for a, b in ((0, 1), (1, 3), (3, 4))]
    assert [entry[:2] for entry in facts.output_scale] == [(1, 1), (2, 3), (4, 4)]
    assert [scale for _, _, scale in facts.output_scale] == pytest.approx(expected, rel=1e-5)


def test_softmax_against_itself_differs_in_nothing():
    model = hf_attnswap.swap(tiny(), "softmax")
    for facts in distribution_facts(model, tokens(24)):
        means = facts.means()
        assert means["row_sum"] == pytest.approx(1) and means["row_sum_spread"] == pytest.approx(0, abs=1e-6)
        assert means["distance"] == pytest.approx(0, abs=1e-6) and means["negative"] == 0
        assert means["entropy"] == pytest.approx(means["softmax_entropy"])
        assert [scale for _, _, scale in facts.output_scale] == pytest.approx([1] * 5)
        assert facts.entropy.shape == (4,)


def test_distributions_tell_the_variants_apart():
    found = {}
    for name in ("relu", "relu_norm", "identity", "none", "window"):
        options = {"window": 4, "sinks": 1} if name == "window" else {}
        facts = distribution_facts(hf_attnswap.swap(tiny(), name, **options), tokens(48))
        found[name] = {key: sum(f.means()[key] for f in facts) / len(facts) for key in facts[0].means()}
        assert len(facts) == 3
    assert found["relu"]["row_sum"] == pytest.approx(1.137, abs=1e-3)  # nothing makes it 1
    assert 0.9 < found["relu_norm"]["row_sum"] <= 1  # 0 where no score is above 0
    assert found["identity"]["negative"] > 0.1 and found["relu"]["negative"] == 0
    assert found["relu_norm"]["sparsity"] > 0.3
    assert found["window"]["effective_keys"] <= 5 < found["window"]["softmax_effective_keys"]
    assert found["none"]["row_sum"] == found["none"]["effective_keys"] == 0


def test_wrong_scale_shows_in_the_output_by_position():
    doubled = hf_attnswap.swap(tiny(), "softmax")
    for attention in hf_attnswap.integration.swapping.swapped_modules(doubled).values():
        attention.forward = lambda *a, f=attention.forward: 2 * f(*a)
    assert distribution_facts(doubled, tokens(64))[1].output_scale[3][2] == pytest.approx(2)


@pytest.mark.parametrize("with_softmax", (False, True))
@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_autograd(name, with_softmax):
    """q, k, v and the layer input, against gradients that autograd is asked for."""
    model = hf_attnswap.swap(tiny(), name)
    ids = tokens(16)
    found = gradient_flow(model, ids, with_softmax)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    kept, inputs = {}, []

    def keep(name, attention, query, key, value, mask, scaling):
        kept[name] = tensors = [t.view_as(t) for t in (query, key, value)]
        if with_softmax:
            return softmax(name, attention, *tensors, mask, scaling)
        return attention(*tensors, mask, scaling)

    hooks = [layer.register_forward_pre_hook(lambda m, a: inputs.append(a[0])) for layer in model.model.layers]
    with answering(model, keep):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    for hook in hooks:
        hook.remove()
    for row, entered in zip(found, inputs, strict=True):
        expected = torch.autograd.grad(loss, [*kept[row.layer], entered], retain_graph=True, allow_unused=True)
        norms = [0 if g is None else g.norm().item() for g in expected]
        assert [row.query, row.key, row.value, row.layer_input] == pytest.approx(norms, rel=1e-4, abs=1e-9)
        assert row.layer_input > 0


def test_no_attention_has_no_gradient():
    for row in gradient_flow(hf_attnswap.swap(tiny(), "none"), tokens(16)):
        assert (row.query, row.key, row.value) == (0, 0, 0) and row.layer_input > 0


def test_gradients_of_swapped_softmax_are_those_of_softmax():
    model = hf_attnswap.swap(tiny(), "softmax")
    for ours, control in zip(gradient_flow(model, tokens(16)), gradient_flow(model, tokens(16), True), strict=True):
        assert vars(ours) | {"layer": 0} == pytest.approx(vars(control) | {"layer": 0}, rel=1e-5)


def share(name, *rows, causal=False):
    query, key = scores_of(*rows)
    return dead_and_saturated(get(name)(HEADS), query, key, Mask(len(rows), len(rows[0]), causal=causal), 1.0)


def test_dead_and_saturated_by_hand():
    # relu: two of six scores are not above 0. The others: d log s / d s = 1 / s < 0.01 for one of four.
    assert share("relu", [1.0, -1.0, 3.0], [200.0, 0.0, 2.0]) == pytest.approx((2 / 6, 1 / 4))
    # softmax: d log w / d s = 1 - w, below 0.01 where one key has nearly all.
    assert share("softmax", [10.0, 0.0, 0.0], [1.0, 1.0, 1.0]) == pytest.approx((0, 1 / 6))
    # sigmoid: 1 - sigmoid(s - log n).
    assert share("sigmoid", [10.0, 0.0, 5.0]) == pytest.approx((0, 1 / 3))
    # Causal: three keys allowed in two rows, one score of them not above 0.
    assert share("relu", [1.0, 9.0], [-1.0, 2.0], causal=True) == pytest.approx((1 / 3, 0))
    assert share("identity", [1.0, 2.0], [0.0, 1.0])[1] is None


def test_relu_gradients_vanish_where_its_weights_are_dead():
    """What `dead` says, autograd shows: no gradient reaches a score whose weight is 0."""
    query, key = scores_of([1.0, -1.0, 3.0])
    query.requires_grad_()
    get("relu")(HEADS).weights(query, key, Mask(1, 3, causal=False), 1.0).sum().backward()
    assert (query.grad[0, 0, 0] != 0).tolist() == [True, False, True]


def test_damage_of_one_layer_is_that_of_swapping_it_alone():
    ids = tokens(24, batch=3)
    swapped = hf_attnswap.swap(tiny(), "elu")
    reference, *rows = layer_damage(swapped, ids)
    with torch.no_grad():
        original = tiny()(ids).logits.log_softmax(-1)
        loss = nn.functional.cross_entropy(original[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert reference.layer is None and reference.kl == 0
        assert reference.nll == pytest.approx(loss.item(), rel=1e-5)
        assert len(rows) == 3
        for index, row in enumerate(rows):
            ours = hf_attnswap.swap(tiny(), "elu", layers=[index])(ids).logits.log_softmax(-1)
            kl = (original.exp() * (original - ours)).sum(-1).mean(1)
            loss = nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            assert row.layer == f"model.layers.{index}.self_attn"
            assert row.kl == pytest.approx(kl.mean().item(), rel=1e-3) and row.kl > 0
            assert row.kl_error == pytest.approx((kl.std() / 3**0.5).item(), rel=1e-3)
            assert row.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert not any(vars(a).get("_answer") for a in hf_attnswap.integration.swapping.swapped_modules(swapped).values())


def test_a_swap_that_changes_nothing_does_no_damage():
    assert all(
        row.kl == pytest.approx(0, abs=1e-6) for row in layer_damage(hf_attnswap.swap(tiny(), "softmax"), tokens(16))
    )


def test_all_of_it_by_layer():
    ids = tokens(24, batch=2)
    model = hf_attnswap.swap(tiny(), "relu", layers=[0, 2])
    found = diagnose(model, ids)
    assert [row["layer"] for row in found["layers"]] == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert (found["tokens"], found["attention"]) == (48, "relu in 2 layers")
    gradients, damage = gradient_flow(model, ids[:1])[1], layer_damage(model, ids)
    row = found["layers"][1]
    assert row["gradient"]["query"] == pytest.approx(gradients.query)
    assert row["gradient_of_softmax"]["query"] == pytest.approx(gradient_flow(model, ids[:1], True)[1].query)
    assert row["kl"] == pytest.approx(damage[2].kl)
    assert row["perplexity_ratio"] == pytest.approx(damage[2].perplexity / damage[0].perplexity)
    assert row["by_head"]["row_sum"] == pytest.approx(distribution_facts(model, ids[:1])[1].row_sum.tolist())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    depth = [r["gradient"]["layer_input"] / r["gradient_of_softmax"]["layer_input"] for r in found["layers"]]
    assert found["gradient_at_first_layer"] == pytest.approx(depth[0])


def test_layers_in_the_order_of_their_damage_are_data_for_a_swap():
    ids = tokens(24, batch=2)
    found = json.loads(json.dumps(diagnose(hf_attnswap.swap(tiny(), "none"), ids)))
    kl = {row["index"]: row["kl"] for row in found["layers"]}
    order = found["layers_by_damage"]
    assert sorted(order) == [0, 1, 2] and [kl[i] for i in order] == sorted(kl.values())
    assert least_damaged(found, 2) == sorted(order[:2])
    best = hf_attnswap.swap(tiny(), "none", layers=least_damaged(found, 1))
    assert list(hf_attnswap.integration.swapping.swapped_modules(best)) == [f"model.layers.{order[0]}.self_attn"]
    with pytest.raises(UsageError, match="count is 4; expected 1 to 3"):
        least_damaged(found, 4)
    with pytest.raises(UsageError, match="no layers_by_damage"):
        least_damaged({"layers": []}, 1)


def test_the_order_of_damage_by_hand():
    rows = [{"index": i, "kl": kl} for i, kl in ((0, 0.5), (1, None), (2, 0.1), (2, 0.7), (3, 0.2))]
    assert by_damage(rows) == [3, 0, 2, 1]


@pytest.mark.parametrize("look", (distribution_facts, gradient_flow, layer_damage, diagnose))
def test_a_model_that_is_not_swapped_is_refused(look):
    with pytest.raises(UsageError, match="not swapped: there is nothing to look at"):
        look(tiny(), tokens(8))


@pytest.mark.parametrize("family", ("gpt2", "gpt_neox", "qwen2"))
def test_other_families(family):
    model = hf_attnswap.swap(tiny(family), "relu_norm")
    assert all(row.layer_input > 0 and row.query > 0 for row in gradient_flow(model, tokens(16)))
    assert len(layer_damage(model, tokens(16))) == 4
