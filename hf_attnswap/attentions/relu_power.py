"""Replace exp by a power of a ReLU: the dial between ReLU and softmax.

o_i = sum_j a_ij v_j / sum_j a_ij with a_ij = relu(1 + (s_ij - c_i) / p)^p, and c_i the largest score of the row
(`shift="max"`) or 0 (`shift="none"`). As p grows, (1 + x/p)^p -> exp(x): softmax. No exp is computed, and weights are
exactly zero where s_ij < c_i - p. alpha-entmax with alpha = 1 + 1/p has the same form with another threshold
(Peters 2019, Correia 2019). O(n^2), as every activation on the scores.
"""

import torch
from torch import nn

from ..ops.spec import Activation, by_total
from .base import Option
from .gain import GainedScores
from .registry import register


@register
class ReluPower(GainedScores):
    """Approximate softmax by a power p of a ReLU; p = 16 costs a few per cent of perplexity without any training."""

    name = "relu_power"
    formula = "sum_j a_ij v_j / sum_j a_ij, a_ij = relu(1 + (s_ij - c_i)/p)^p, c_i = max_j s_ij"
    source = "exp(x) = lim (1 + x/p)^p; entmax: Peters 2019"
    p = Option(16, "the power, a power of two; larger is closer to softmax", choices=tuple(2**i for i in range(11)))
    shift = Option(
        "max", "what is subtracted from the scores of a row: its maximum, or nothing", choices=("max", "none")
    )
    temperature = Option(False, "learn a factor per head on the scores, 1 at the start")

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        if self.temperature:
            self.log_temperature = nn.Parameter(torch.empty(heads.num_attention_heads))
            self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        if self.temperature:
            nn.init.zeros_(self.log_temperature)

    def activation(self):
        factor = self.log_temperature.exp() / self.p if self.temperature else 1 / self.p
        params = {"p": self.p, "shift": self.shift}
        return Activation("relu_power", relu_power, params, denominator=by_total(), factor=factor, needs_peak=True)


def relu_power(scores, count, peak, p, shift):
    """Return `relu(1 + s - c)^p` of scores and peaks that are divided by p already.

    Args:
        scores: `[..., h, t, s]`, overwritten where gradients are disabled. count: not read.
        peak: `[..., h, t, 1]`, the largest score of the row.
        p: a power of two. shift: "max" for c the largest score; "none" for 0, divided by the largest term of the row,
            which cancels.
    """
    # A row that may attend to nothing has no largest score.
    peak = peak.clamp(min=torch.finfo(scores.dtype).min)
    # In place where no gradient needs what is overwritten.
    learning = torch.is_grad_enabled()
    if shift == "max":
        # The 1 comes last: beside a large score it would be rounded away, and with it the whole row.
        a = (scores - peak if learning else scores.sub_(peak)).add_(1).relu_()
    else:  # the largest is 1 with the other shift; a factor of the row cancels
        largest = (1 + peak).detach().clamp(min=torch.finfo(scores.dtype).tiny)
        a = torch.relu(1 + scores) / largest
    for _ in range(p.bit_length() - 1):
        a = a * a if learning else a.mul_(a)
    return a
