"""Learn a factor per head on the output, for variants on the scores: o_i = g_h sum_j w_ij v_j.

Most of these variants have another output scale than softmax; the gain lets a layer reach the scale of softmax without
moving its projections. The gain is an option, off by default, because a swap without training should add no parameters.
"""

import torch
from torch import nn

from .base import Option
from .scores import ScoreAttention
from .softmax import Softmax


class GainedScores(ScoreAttention):
    """Hold an optional learned factor per head on the output; `weights` are those before the factor."""

    family = "gain"
    gain = Option(False, "learn a factor per head on the output, 1 at the start")

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        if self.gain:
            self.output_gain = nn.Parameter(torch.ones(heads.num_attention_heads))

    def reset_parameters(self):
        if self.gain:
            nn.init.ones_(self.output_gain)

    def head_gain(self):
        return self.output_gain if self.gain else None

    @torch.no_grad()
    def calibrate(self, query, key, value, mask, scaling):
        """Set the gain of each head by least squares on the output of softmax.

        g = <u, softmax's output> / <u, u>, u the output without the gain; 1 for a head whose output is zero.
        """
        if not self.gain:
            return
        nn.init.ones_(self.output_gain)
        unscaled, softmax = (a(query, key, value, mask, scaling).float() for a in (self, Softmax(self.heads)))
        valid = mask.new_tokens()
        if valid is not None:
            unscaled = unscaled * valid[:, None, :, None]
        size = unscaled.square().sum((0, 2, 3))
        # A head without any output tells nothing.
        fitted = (unscaled * softmax.nan_to_num(0.0)).sum((0, 2, 3)) / size.clamp(min=1e-30)
        self.output_gain.copy_(torch.where(size > 0, fitted, 1.0))
