"""Whisper's word timestamps, which set the attention of the model to eager, and what `inspect` says of it."""

import json

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import hf_attnswap
from hf_attnswap.sources.models import architecture, load_any

CONFIG = dict(
    vocab_size=200, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=50,
    max_target_positions=64, median_filter_width=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None, init_std=0.3,
)  # fmt: skip
SOUND = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
WORDS = dict(return_timestamps=True, return_token_timestamps=True)


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**CONFIG)).eval()
    model.generation_config.alignment_heads = [[0, 0], [1, 1]]
    model.generation_config.no_timestamps_token_id = 190
    return model


def test_softmax_through_the_seam_gives_the_timestamps_of_the_model():
    expected = whisper().generate(SOUND, max_new_tokens=8, **WORDS)
    found = hf_attnswap.swap(whisper(), "softmax").generate(SOUND, max_new_tokens=8, **WORDS)
    assert torch.equal(found["sequences"], expected["sequences"])
    torch.testing.assert_close(found["token_timestamps"], expected["token_timestamps"])


@pytest.mark.parametrize("kinds", (["causal", "bidirectional"], ["bidirectional"], ["cross"]), ids=str)
def test_word_timestamps_leave_the_model_as_it_is(kinds):
    model = hf_attnswap.swap(whisper(), "relu_power", kinds=kinds)
    plain = model.generate(SOUND, max_new_tokens=8)
    timed = model.generate(SOUND, max_new_tokens=8, **WORDS)
    assert timed["token_timestamps"].isfinite().all()
    assert torch.equal(model.generate(SOUND, max_new_tokens=8), plain)
    assert model.model.config._attn_implementation == "attnswap"


def test_what_a_state_cannot_tell_is_refused_and_the_model_goes_on():
    model = hf_attnswap.swap(whisper(), "elu")
    plain = model.generate(SOUND, max_new_tokens=8)
    with pytest.raises(NotImplementedError, match="output_attentions needs all keys"):
        model.generate(SOUND, max_new_tokens=8, **WORDS)
    assert torch.equal(model.generate(SOUND, max_new_tokens=8), plain)


@pytest.mark.parametrize("named", (True, False))
def test_inspect_says_what_convert_swaps(named, tmp_path):
    whisper().save_pretrained(tmp_path)
    if not named:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    found = hf_attnswap.inspect(architecture(str(tmp_path)))
    loaded = hf_attnswap.inspect(load_any(str(tmp_path))[0])
    assert [entry.as_dict() for entry in found] == [entry.as_dict() for entry in loaded]
    assert {entry.kind for entry in found} == {"causal", "bidirectional", "cross"}
