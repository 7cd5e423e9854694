"""Describe to an op what a variant computes: plain data that a kernel can match, and the Python form beside it.

`name` and `params` are what a kernel matches, `tensors` are what a kernel reads and what may need a gradient, and `f`
is the same computation in torch, which the reference and the portable forms call. `f` is a plain function: all that
`f` depends on stands in `params` and `tensors`, which are passed to `f` as keywords. Nobody changes a spec; these
classes are not frozen only because a spec is made at every call, and freezing makes that several times as slow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ALL_HEADS: slice = slice(None)


@dataclass(eq=False)
class Denominator:
    """Describe the number d_i by which the sum of row i is divided; calling it computes d_i.

    Attributes:
        name: what a kernel matches, "count" or "total".
        f: `(total, count, **params) -> d`, `[..., h, t, 1]` or 1 in places. `total` is the sum of the weights of the
            row, None unless `needs_total`; `count` is the number of keys that the row may attend to, at least 1.
        params: numbers, passed to `f` as keywords.
        needs_total: whether `f` reads the sum of the weights.
    """

    name: str
    f: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    needs_total: bool = False

    def __call__(self, total: Tensor | None, count: Tensor) -> Tensor:
        """Return d_i, broadcastable to `[..., h, t, 1]`.

        Args:
            total: sum of the weights of each row, `[..., h, t, 1]`; None unless `needs_total`.
            count: number of keys that each row may attend to, broadcastable to `[..., h, t, 1]`.
        """
        return self.f(total, count, **self.params)


def by_count(alpha: float = 1.0) -> Denominator:
    """Return the denominator `n_i^alpha`, n_i the number of keys that row i may attend to (Wortsman et al., 2023)."""
    return Denominator("count", _power_of_count, {"alpha": alpha})


def by_total(eps: float = 0.0) -> Denominator:
    """Return the denominator `sum_j a_ij + eps`; without `eps`, a row whose sum is 0 is divided by 1."""
    return Denominator("total", _total_or_one, {"eps": eps}, needs_total=True)


def _power_of_count(total, count, alpha):
    return count**alpha


def _total_or_one(total, count, eps):
    return total + eps if eps else torch.where(total > 0, total, 1)


@dataclass(eq=False)
class Activation:
    """Describe the weights on scores: `a_ij = f(factor s_ij, ...)` and `o_i = sum_j a_ij v_j / d_i`.

    Attributes:
        name: what a kernel matches, such as "relu"; the denominator has a name too.
        f: `(scores, count, peak, **params, **tensors) -> a`, element by element. `scores` are `[..., h, t, s]`, already
            times `factor`, and -inf where the row may not attend to the key: the weight there must be 0. `f` may
            overwrite `scores`. `count` is how many keys each row may attend to, at least 1, broadcastable to
            `[..., h, t, 1]`; `peak` is the largest score of each row (-inf where it may attend to nothing), None
            unless `needs_peak`.
        params: numbers and words, passed to `f` as keywords.
        tensors: what the variant learns, each with the query heads first, `[H, ...]`; `f` gets the entries of the
            heads of its scores, `[h, ...]`.
        denominator: d_i; None for 1.
        factor: multiplies all scores, a number or a tensor `[H]`; cheaper on the queries than in `f`.
        needs_peak: whether `f` reads the largest score of the row.
    """

    name: str
    f: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    denominator: Denominator | None = None
    factor: float | Tensor = 1.0
    needs_peak: bool = False

    @property
    def needs_total(self) -> bool:
        """Return whether the denominator reads the sum of the weights of a row."""
        return self.denominator is not None and self.denominator.needs_total

    def learned(self) -> list[Tensor]:
        """Return every tensor that may need a gradient: `tensors`, and `factor` where that is a tensor."""
        return [*self.tensors.values(), *([self.factor] if torch.is_tensor(self.factor) else [])]

    def factor_for(self, scores: Tensor) -> float | Tensor:
        """Return the factor, ready to multiply `[..., H, t, s]` or `[..., H, t, D]`, in the dtype of that tensor."""
        return self.factor.to(scores.dtype)[:, None, None] if torch.is_tensor(self.factor) else self.factor

    def __call__(self, scores: Tensor, count: Tensor, peak: Tensor | None, heads: slice = ALL_HEADS) -> Tensor:
        """Return the weights a_ij, in the shape of `scores`; `f` may overwrite `scores`.

        Args:
            scores, count, peak: as `f` takes them.
            heads: the query heads to which the scores belong; all by default.
        """
        tensors = self.tensors if heads is ALL_HEADS else {name: t[heads] for name, t in self.tensors.items()}
        return self.f(scores, count, peak, **self.params, **tensors)


@dataclass(eq=False)
class FeatureMap:
    """Describe the map phi of linear attention; `phi(q_i) . phi(k_j)` is the weight of key j in row i.

    Attributes:
        name: what a kernel matches, such as "elu".
        f: `(x, **params, **tensors) -> phi`, `[B, heads, t, D]` -> `[B, heads, t, F]`, each token by itself; x is in
            float32 (float64 for float64 inputs).
        params: numbers and words, passed to `f` as keywords.
        tensors: what the variant learns, or a fixed projection.
        beside: the map of queries beside a softmax (`hybrid`), where a factor of the row does not cancel. Takes what
            `f` takes, and returns the features and the log of a factor of each row that was left out of the features,
            `[B, heads, t, 1]`. Any factor that keeps the features in range will do, so it is a constant to the
            gradient. None where `f` leaves nothing out.
    """

    name: str
    f: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of `x`, `[B, heads, t, D]` -> `[B, heads, t, F]`."""
        return self.f(x, **self.params, **self.tensors)

    def beside_softmax(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the features of queries beside a softmax, and the log of the factor left out of each row.

        The features are `[B, heads, t, F]`; the log is `[B, heads, t, 1]`, or None where no factor was left out.
        """
        return (self(x), None) if self.beside is None else self.beside(x, **self.params, **self.tensors)
