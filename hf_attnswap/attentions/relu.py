"""Divide an activation on the scores by the number of keys: o_i = sum_j a(s_ij) v_j / n_i^alpha.

Wortsman et al., "Replacing softmax with ReLU in vision transformers", 2023 (relu/L); for causal rows n_i is the
number of keys that the row may attend to. The activation stands on the product of q and k: O(n^2) remains.
"""

from typing import ClassVar

import torch.nn.functional as F

from ..ops.spec import Activation, by_count
from .base import Option
from .gain import GainedScores
from .registry import register


def relu(scores, count, peak):
    """Return max(s, 0), written over the scores; an `f` of `Activation`, as the three below."""
    return scores.relu_()


def squared_relu(scores, count, peak):
    """Return max(s, 0)^2; the scores are overwritten."""
    return scores.relu_().square()


def gelu(scores, count, peak):
    """Return gelu(s), 0 where a key may not be seen."""
    return F.gelu(scores.clamp(min=-100))  # of -inf it is NaN; here it is zero from -15 on


def softplus(scores, count, peak):
    """Return log(1 + e^s), 0 where a key may not be seen."""
    return F.softplus(scores)


class ActivatedScores(GainedScores):
    """Weigh values by a curve of the scores: rows do not sum to one, and the scale of the output depends on the text.

    Attributes:
        curve: the name and the function of the activation.
    """

    source = "Wortsman 2023"
    curve: ClassVar[tuple]  # its name and function
    alpha = Option(1.0, "exponent of the number of keys in the denominator", minimum=0.0)

    def activation(self):
        return Activation(*self.curve, denominator=by_count(self.alpha))


@register
class Relu(ActivatedScores):
    """Weigh values by relu(s): weights are zero where the score is not positive."""

    name = "relu"
    formula = "sum_j relu(s_ij) v_j / n_i^alpha"
    curve = ("relu", relu)


@register
class Relu2(ActivatedScores):
    """Weigh values by relu(s)^2: the square prefers large scores, as exp does."""

    name = "relu2"
    formula = "sum_j relu(s_ij)^2 v_j / n_i^alpha"
    curve = ("relu2", squared_relu)


@register
class Gelu(ActivatedScores):
    """Weigh values by gelu(s): weights are a little below zero for scores a little below zero."""

    name = "gelu"
    formula = "sum_j gelu(s_ij) v_j / n_i^alpha"
    curve = ("gelu", gelu)


@register
class Softplus(ActivatedScores):
    """Weigh values by log(1 + e^s): a smooth relu, never zero."""

    name = "softplus"
    formula = "sum_j softplus(s_ij) v_j / n_i^alpha"
    curve = ("softplus", softplus)
