"""Random models of a few thousand parameters, one per family, whose attention matters to their logits."""

import functools

import torch
from device_under_test import DEVICE
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

_SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512,
    initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
_GATED = dict(intermediate_size=48, num_key_value_heads=2)
FAMILIES = {
    "llama": _GATED,
    "gpt2": dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "mistral": dict(sliding_window=None, **_GATED),
    "qwen2": _GATED,
    "gpt_neox": dict(intermediate_size=48),
}
# Models whose attention modules do something that the families above do not.
UNUSUAL = {
    "ctrl": dict(n_embd=32, n_layer=3, n_head=4, n_positions=512, dff=48),  # calls its cache layer_past
    "gpt_bigcode": dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),  # so does this one; one key/value head
    "deepseek_v3": dict(  # keys are wider than values, and neither is head_dim
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
        intermediate_size=48, num_key_value_heads=4, n_routed_experts=2, n_group=1, topk_group=1,
        num_experts_per_tok=1, moe_intermediate_size=16,
    ),
    "diffllama": _GATED,  # calls its attention twice per layer
    "jetmoe": dict(  # several query heads per expert
        intermediate_size=48, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2, kv_channels=8,
    ),
    "gemma3n_text": dict(  # the last two layers use the keys and values of those before
        head_dim=8, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, laurel_rank=4, sliding_window=512, **_GATED,
    ),
    "zaya": dict(  # a convolution keeps a state beside; grouped experts take no float64
        head_dim=8, num_local_experts=2, num_experts=2, experts_implementation="eager", **_GATED,
    ),
}  # fmt: skip


@functools.cache
def _weights(family: str) -> dict:
    """The same random weights for every model of a family; biases and norms off their start too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family))
    return {n: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t for n, t in model.state_dict().items()}


def _config(family: str, **overrides):
    return AutoConfig.for_model(family, **{**_SIZES, **(FAMILIES | UNUSUAL)[family], **overrides})


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides):
    """A model of a family in eval mode; `overrides` must not change the shapes of its weights."""
    model = AutoModelForCausalLM.from_config(_config(family, **overrides))
    model.load_state_dict(_weights(family))
    return model.to(DEVICE, dtype).eval()


def tokens(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Random token ids that are not special."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(model):
    """New parameters off their start, so that a test sees what they do."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attnswap." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_encoder():
    """A BERT without its heads, in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", intermediate_size=48, **_SIZES)
    return AutoModel.from_config(config).to(DEVICE).eval()
