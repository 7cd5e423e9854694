"""Distillation: the divergence without the logits of a whole text, and the original model as its own teacher."""

import copy
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny_models import randomise, tiny, tokens
from torch import nn
from torch.nn import functional as F

from hf_attnswap import UsageError, swap
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.training.batches import batches
from hf_attnswap.training.distill import chunked_kl, distillation_loss
from hf_attnswap.training.loop import train
from hf_attnswap.training.stages.distill import Distill
from hf_attnswap.training.teacher import as_original, frozen

TEXT = tokens(24, batch=2)


def student(attention="relu_norm"):
    return randomise(swap(tiny(), attention))


def with_lora(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    for variant in swapped_modules(wrapped).values():
        variant.requires_grad_(True)
    return wrapped


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT, use_cache=False).logits


def plain_kl(ours, theirs, temperature):
    """From its definition, sum_x p (log p - log q)."""
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (theirs, ours))
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_and_its_gradient_are_those_of_the_plain_form(temperature):
    model, teacher = student(), frozen(tiny())
    found = distillation_loss(model, teacher, TEXT, temperature=temperature, tokens_at_once=7)
    found.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = plain_kl(model(input_ids=TEXT).logits, logits(teacher), temperature)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found > 0.01
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_tied_and_frozen_embeddings():
    """A weight that is both embedding and head gets both gradients; a frozen head hands them on and gets none."""
    teacher = frozen(tiny())
    for trains in (True, False):
        model = student()
        model.lm_head.weight = model.model.embed_tokens.weight
        model.lm_head.weight.requires_grad_(trains)
        distillation_loss(model, teacher, TEXT, tokens_at_once=7).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        plain_kl(model(input_ids=TEXT).logits, logits(teacher), 1.0).backward()
        assert (grads["model.embed_tokens.weight"] is not None) == trains
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("trains", ["hidden", "head", "both"])
def test_the_divergence_in_float64(temperature, trains):
    """Of hidden states and of a head with a bias, whose weight is also used elsewhere; in two parts of a batch."""
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(8, 40).double(), nn.Linear(6, 40).double()
    hidden, theirs = torch.randn(23, 8).double(), torch.randn(23, 6).double()
    head.requires_grad_(trains != "hidden")
    hidden.requires_grad_(trains != "head")
    leaves = [p for p in (hidden, *head.parameters()) if p.requires_grad]

    def grads(loss):
        total = sum(0.5 * loss(hidden[part], theirs[part]) for part in (slice(0, 11), slice(11, 23)))
        return [total, *torch.autograd.grad(total + head.weight.square().sum() * (trains != "hidden"), leaves)]

    def ours(hidden, theirs):
        return chunked_kl(hidden, theirs, head, teacher_head, temperature=temperature, tokens_at_once=5)

    def plain(hidden, theirs):
        return plain_kl(head(hidden), teacher_head(theirs).detach(), temperature)

    for found, expected in zip(grads(ours), grads(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert ours(hidden, theirs).item() == pytest.approx(plain(hidden, theirs).item(), rel=1e-12)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_labels_beside_the_divergence_in_float64(weight):
    """(1 - w) KL + w CE, and the KL alone where there is no label; one part has no label at all."""
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(8, 40).double(), nn.Linear(6, 40).double()
    hidden, theirs = torch.randn(23, 8).double().requires_grad_(), torch.randn(23, 6).double()
    labels = torch.randint(40, (23,))
    labels[3], labels[10:15] = -100, -100
    loss = chunked_kl(
        hidden, theirs, head, teacher_head, labels=labels, label_weight=weight, tokens_at_once=5
    )  # fmt: skip
    p, q = teacher_head(theirs).detach().log_softmax(-1), head(hidden).log_softmax(-1)
    of_rows = (p.exp() * (p - q)).sum(-1)
    told = labels != -100
    entropy = nn.functional.cross_entropy(head(hidden[told]), labels[told], reduction="none")
    expected = (of_rows[~told].sum() + ((1 - weight) * of_rows[told] + weight * entropy).sum()) / 23
    leaves = [hidden, *head.parameters()]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_labels_are_the_next_tokens_of_each_text():
    """Neither a text's last token nor one before padding or before another document has a label."""
    model, teacher = student(), frozen(tiny())
    valid = torch.ones_like(TEXT)
    valid[0, -5:] = 0
    inputs = {"input_ids": TEXT, "attention_mask": valid, "use_cache": False}
    found = distillation_loss(model, teacher, inputs, label_weight=1.0, tokens_at_once=7)
    labels = TEXT.masked_fill(valid == 0, -100)
    with torch.no_grad():
        told = model(**inputs, labels=labels).loss * (labels[:, 1:] != -100).sum()
        alone = distillation_loss(model, teacher, inputs).item()
        q, p = (m(**inputs).logits.log_softmax(-1) for m in (model, teacher))
        last = (p.exp() * (p - q)).sum(-1)[torch.arange(len(TEXT)), valid.sum(1) - 1].sum()
    assert found.item() == pytest.approx(((told + last) / valid.sum()).item(), rel=1e-5) and found.item() != alone


@pytest.mark.parametrize(
    "given, said",
    [
        ({"label_weight": 1.5}, "label_weight is 1.5"),
        ({"label_weight": float("nan")}, "label_weight is nan"),
        ({"label_weight": 0.5, "temperature": 2.0}, "temperature of 1; it is 2.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"hidden_weight": -1.0}, "hidden_weight is -1.0"),
    ],
)
def test_weights_out_of_their_range_are_refused_before_anything_runs(given, said):
    with pytest.raises(UsageError, match=said):
        distillation_loss(None, None, TEXT, **given)
    with pytest.raises(UsageError, match=said):
        Distill(model_name_or_path="x", output_dir=Path("out"), train_file="text.txt", max_train_steps=1, **given)


def test_the_divergence_under_autocast():
    """bfloat16 computes the logits; the gradients come in the dtypes of what they are of."""
    torch.manual_seed(0)
    head, hidden, theirs = nn.Linear(8, 40), torch.randn(23, 8, requires_grad=True), torch.randn(23, 8)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = chunked_kl(hidden, theirs, head, copy.deepcopy(head), tokens_at_once=5)
        found.append([loss, *torch.autograd.grad(loss, [hidden, *head.parameters()])])
    for exact, mixed in zip(*found, strict=True):
        assert mixed.dtype == torch.float32 and not torch.equal(mixed, exact)
        torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def test_no_tensor_holds_the_logits_of_all_tokens():
    """Forward and backward, and the memory that stays between them."""
    n, vocabulary = 64, 1000
    hidden, theirs = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8)
    head = nn.Linear(8, vocabulary, bias=False)

    def measure(loss):
        kept = weakref.WeakSet()

        def keep(tensor):
            kept.add(held := Kept(tensor))
            return held

        with Peak() as peak:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
                result = loss()
            stays = sum(held.tensor.numel() for held in kept)
            result.backward()
        grad, hidden.grad, head.weight.grad = (hidden.grad, head.weight.grad), None, None
        return peak.largest, stays, result, grad

    def plain():
        target = F.log_softmax(head(theirs), -1).detach()
        return F.kl_div(F.log_softmax(head(hidden), -1), target, reduction="batchmean", log_target=True)

    largest, kept, ours, grads = measure(lambda: chunked_kl(hidden, theirs, head, head, tokens_at_once=4))
    plain_largest, plain_kept, expected, plain_grads = measure(plain)
    assert plain_largest == n * vocabulary and plain_kept >= 2 * n * vocabulary
    assert largest == 8 * vocabulary  # the head's weight; logits are [4, vocabulary]
    assert kept == (n + vocabulary) * 8  # the gradients of both
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("attention", ["relu_norm", "hedgehog+window"])
def test_softmax_on_and_lora_off_is_the_original(attention):
    model = swap(tiny(), attention, **({"window": 4, "sinks": 1} if "window" in attention else {}))
    model = with_lora(randomise(model))
    ours = logits(model)
    with as_original(model):
        torch.testing.assert_close(logits(model), logits(tiny()), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), ours) and (ours - logits(tiny())).abs().max() > 0.1
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora_" in n or ".attnswap." in n
    }


def test_a_model_with_lora_is_its_own_teacher():
    model = with_lora(student("hedgehog"))
    found = distillation_loss(model, model, TEXT)
    found.backward()
    expected = plain_kl(logits(model), logits(tiny()), 1.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_teacher_that_trains_is_refused():
    model = student()
    with pytest.raises(UsageError, match="the teacher's own weights train"):
        distillation_loss(model, model, TEXT)
    model = get_peft_model(student(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UsageError, match="the teacher's own weights train"):
        distillation_loss(model, model, TEXT)


def test_lora_on_the_output_embeddings_with_a_teacher_of_its_own():
    model = get_peft_model(student(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    distillation_loss(model, frozen(tiny()), TEXT, tokens_at_once=7).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    plain_kl(model(input_ids=TEXT).logits, logits(tiny()), 1.0).backward()
    assert len(grads) == 2
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_logits_that_are_changed_after_the_head_are_refused():
    model = frozen(tiny())
    forward = model.forward

    def capped(**inputs):
        out = forward(**inputs)
        out.logits = torch.tanh(out.logits)
        return out

    model.forward = capped
    with pytest.raises(UsageError, match="it caps or scales them"):
        distillation_loss(student(), model, TEXT)


def test_hidden_states_of_equal_layers():
    """Nothing for the same model; every token's angle counts the same, however long its hidden state is."""
    teacher = frozen(tiny())
    assert distillation_loss(tiny(), teacher, TEXT, hidden_weight=1.0).item() == pytest.approx(0, abs=1e-5)
    model = student()
    without, with_hidden = (distillation_loss(model, teacher, TEXT, hidden_weight=w).item() for w in (0.0, 2.0))
    with torch.no_grad():
        ours, theirs = (m(input_ids=TEXT, output_hidden_states=True).hidden_states[1:] for m in (model, teacher))
    cosines = [
        ((a / a.norm(dim=-1, keepdim=True)) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert with_hidden - without == pytest.approx(2 * (1 - torch.stack(cosines).mean()).item(), rel=1e-4)


def test_padding_counts_for_nothing():
    model, teacher = student(), frozen(tiny())
    padded = torch.cat([TEXT, torch.zeros(2, 5, dtype=torch.long)], 1)
    inputs = {"input_ids": padded, "attention_mask": (padded > 0).long(), "use_cache": False}
    whole = distillation_loss(model, teacher, TEXT, hidden_weight=1.0)
    same = distillation_loss(model, teacher, inputs, hidden_weight=1.0)
    assert same.item() == pytest.approx(whole.item(), rel=1e-4)


def test_training_brings_the_model_closer_and_leaves_the_teacher_alone():
    model, teacher = student(), frozen(tiny())
    before = copy.deepcopy(teacher.state_dict())
    text = tokens(24, batch=8)
    losses = train(
        Accelerator(cpu=True),
        model,
        batches(text, 4, seed=0),
        lambda model, batch: distillation_loss(model, teacher, batch),
        learning_rate=3e-3,
        steps=16,
    )
    assert sum(losses[12:]) < 0.5 * sum(losses[:4])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
