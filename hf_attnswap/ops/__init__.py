"""The computations behind the variants: plain functions on `[batch, heads, sequence, dimension]` tensors.

Nothing here knows transformers, masks of transformers, or which variant calls.
"""
