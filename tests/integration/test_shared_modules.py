"""One attention module for all layers, as in ALBERT: it runs twelve times in a forward pass, and is one entry."""

import pytest
import torch
from tiny_models import randomise, tokens
from transformers import AlbertConfig, AlbertForMaskedLM

import hf_attnswap
from hf_attnswap.evaluation.diagnose import diagnose
from hf_attnswap.training.align import aligning, alignment_loss

IDS = tokens(10)


def albert() -> AlbertForMaskedLM:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=12, num_attention_heads=4,
        intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return AlbertForMaskedLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ("softmax", "relu_norm", "elu", "hedgehog"))
def test_every_run_is_swapped(name, tmp_path):
    model = albert()
    expected = model(IDS).logits
    found = randomise(hf_attnswap.swap(model, name))(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4) == (name == "softmax")
    assert [entry.swapped for entry in hf_attnswap.inspect(model)] == [name]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AlbertForMaskedLM.from_pretrained(tmp_path).eval()(IDS).logits, found)
    assert torch.equal(hf_attnswap.restore(model)(IDS).logits, expected)


def test_it_is_diagnosed_and_aligned_over_all_its_runs():
    model = hf_attnswap.swap(albert(), "hedgehog")
    (layer,) = diagnose(model, IDS, mask_token_id=2)["layers"]
    assert layer["kl"] > 0 and layer["distance"] > 0 and layer["gradient"]["query"] > 0
    with aligning(model) as losses:
        assert alignment_loss(model, IDS, losses) > 0 and len(losses) == 1
