"""Compute linear attention with phi(x) = elu(x) + 1. Katharopoulos et al., "Transformers are RNNs", 2020."""

import torch

from ..ops.spec import FeatureMap
from .linear import LinearAttention
from .registry import register


@register
class Elu(LinearAttention):
    """Weigh keys by positive features: exp(x) below zero, x + 1 above."""

    name = "elu"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = elu(x) + 1"
    cost = "O(n d^2)"
    source = "Katharopoulos 2020"

    def feature_map(self):
        return ELU


def elu_features(x):
    """Return elu(x) + 1, element by element, in the shape and dtype of x."""
    return _EluPlusOne.apply(x) if torch.is_grad_enabled() else _elu_plus_one(x)


def _elu_plus_one(x):
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


class _EluPlusOne(torch.autograd.Function):
    """Compute elu(x) + 1 = exp(min(x, 0)) + max(x, 0), with derivative min(phi, 1).

    The function takes half the passes over memory of torch's elu followed by an addition, which cost as much as the
    products.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return _elu_plus_one(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (phi,) = ctx.saved_tensors
        return grad * phi.clamp(max=1)


ELU = FeatureMap("elu", elu_features)
