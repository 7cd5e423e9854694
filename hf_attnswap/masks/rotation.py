"""The rotation by position (RoPE) that a call gave its queries and keys, and how to undo it.

Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021: numbers of a query or key go by pairs,
and the pair p of the token at position i is turned by the angle `i theta_p`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Say by which angles the tokens of a call were turned, and which numbers of a query or key make a pair.

    Attributes:
        turns: `[B, T, 2 P]`, the cosines of the P pairs and then their sines, both divided by `cos^2 + sin^2`: some
            models scale queries and keys by their rotation.
        neighbours: whether the numbers 2 p and 2 p + 1 make a pair (as in GPT-J), or p and P + p (as in Llama).
        start: the first number that is turned; 2 P numbers are, and all others stay as they are.
    """

    turns: Tensor
    neighbours: bool = False
    start: int = 0

    def undo(self, x: Tensor) -> Tensor:
        """Return queries or keys `[B, heads, T, D]` as they were before the rotation, in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        pairs = self.turns.shape[-1] // 2
        cos, sin = self.turns[:, None].to(x.dtype).split(pairs, dim=-1)
        before, turned, behind = x.split((self.start, 2 * pairs, x.shape[-1] - self.start - 2 * pairs), dim=-1)
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.neighbours else turned.split(pairs, dim=-1)
        parts = a * cos + b * sin, b * cos - a * sin
        turned = torch.stack(parts, dim=-1).flatten(-2) if self.neighbours else torch.cat(parts, dim=-1)
        return turned if turned.shape == x.shape else torch.cat([before, turned, behind], dim=-1)

    def of(self, turns: Tensor) -> "Rotation":
        """Return the rotation of other tokens, whose `turns` are given."""
        return replace(self, turns=turns)

    def tokens(self, part: slice) -> "Rotation":
        """Return the rotation of some of the T tokens."""
        return self.of(self.turns[:, part])
