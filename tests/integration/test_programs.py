"""What programs make of a swapped model: an exported program for any length, gradients of each sample."""

import pytest
import torch
from attention_cases import NAMES, small_options
from swapped_models import SPARSE
from tiny_models import randomise, tiny, tokens
from torch.func import functional_call, grad, vmap
from transformers import BertConfig, BertModel

import hf_attnswap
from hf_attnswap import attentions

USUAL = ("elu", "relu_power")
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)


def models(name: str):
    """A decoder of one layer, and an encoder where the variant is for one."""
    decoder = tiny()
    del decoder.model.layers[1:]
    decoder.config.num_hidden_layers, decoder.config.use_cache = 1, False
    encoder = [BertModel(BertConfig(**SIZES)).eval()] if "bidirectional" in attentions.get(name).kinds else []
    return [randomise(hf_attnswap.swap(model, name, **small_options(name))) for model in (decoder, *encoder)]


def padded(batch: int, length: int) -> dict:
    mask = (torch.arange(length) >= length // 5).long().repeat(batch, 1)
    return dict(input_ids=tokens(length, batch), attention_mask=mask)


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.long) for n in NAMES])
def test_one_exported_program_for_any_batch_and_length(name):
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    for model in models(name):
        shapes = {"input_ids": sizes, "attention_mask": sizes}
        with torch.no_grad():
            exported = torch.export.export(model, (), padded(2, 12), dynamic_shapes=shapes, strict=False).module()
            for batch, length in ((3, 20), (2, 64), (1, 65), (2, 130), (2, 2)):
                given = padded(batch, length)
                seen = given["attention_mask"].bool()
                torch.testing.assert_close(exported(**given)[0][seen], model(**given)[0][seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learning", (False, True))
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) for n in ("relu_power", *SPARSE)])
def test_one_compiled_graph_for_any_batch_and_length(name, learning):
    model = models(name)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((3, 20), (2, 64), (5, 65), (2, 130)):
        given, found = padded(batch, length), []
        seen = given["attention_mask"].bool()
        for run in (compiled, model):
            model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(learning):
                with torch._dynamo.config.patch(error_on_recompile=True):
                    found.append([run(**given).logits[seen]])
            if learning:
                found[-1][0].square().mean().backward()
                found[-1] += [p.grad for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_each_sample(name):
    model, given = models(name)[0], padded(2, 12)
    given["attention_mask"][1, :5] = 0
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights, ids, mask):
        inputs = dict(input_ids=ids[None], labels=ids[None], attention_mask=mask[None])
        return functional_call(model, weights, (), inputs).loss

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, given["input_ids"], given["attention_mask"])
    for row in range(2):
        model.zero_grad(set_to_none=True)
        loss(dict(model.named_parameters()), given["input_ids"][row], given["attention_mask"][row]).backward()
        for parameter, tensor in model.named_parameters():
            if tensor.grad is not None:
                torch.testing.assert_close(found[parameter][row], tensor.grad, rtol=1e-3, atol=1e-5)
