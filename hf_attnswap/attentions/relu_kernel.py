"""Compute linear attention with phi(x) = relu(x): ReLU on q and on k, not on their product, which makes it O(n).

Kasai et al., "Finetuning pretrained transformers into RNNs" (T2R, without its projection), 2021; EfficientViT, 2023.
"""

import torch

from ..ops.spec import FeatureMap
from .linear import LinearAttention
from .registry import register

RELU = FeatureMap("relu", torch.relu)


@register
class ReluKernel(LinearAttention):
    """Weigh keys by the features that they share with the query; a row that shares none with any key is zero."""

    name = "relu_kernel"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = relu(x)"
    cost = "O(n d^2)"
    source = "Kasai 2021, Cai 2023"

    def feature_map(self):
        return RELU
