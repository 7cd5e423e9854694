"""The end of every portable file: puts the variants of its table on a model. Not imported; `portable.py` copies it."""
# ruff: noqa: F821

# From here on: how the variants get into the model.


def swapped_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What transformers calls for every attention module; softmax where the table has no variant."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    variant = getattr(module, "attnswap", None)
    refused = [name for name in ("position_bias", "softcap", "s_aux", "sinks") if kwargs.get(name) is not None]
    if refused or dropout:
        raise NotImplementedError(f"{refused or 'attention dropout'} is not supported here: pip install hf_attnswap")
    if variant is None:
        causal = attention_mask is None and query.shape[2] > 1
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, is_causal=causal, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    mask = Mask(query.shape[2], key.shape[2], dense=attention_mask)
    return variant.reference(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


NAME = "attnswap_portable"
AttentionInterface.register(NAME, swapped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(GUARD, swapped_attention)


class SwappedArchitecture(Architecture):
    """The model of config.json, its swapped layers computed by their definitions."""

    def __init__(self, config):
        if "hf_attnswap" in sys.modules:  # which does it all, and fast
            super().__init__(config)
            return
        if config._attn_implementation not in (GUARD, NAME):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} would run softmax: leave attn_implementation out"
            )
        config._attn_implementation = NAME
        super().__init__(config)
        for place, (name, options, *heads) in SWAPPED.items():
            self.get_submodule(place.removesuffix(".attnswap")).attnswap = VARIANTS[name](Heads(*heads), **options)
