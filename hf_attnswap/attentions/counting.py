"""Count what attention costs from shapes alone, for the `operations` of variants."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..ops.spec import FeatureMap


def pairs(rows: int, keys: int, causal: bool = True, window: int | None = None) -> float:
    """Return how many pairs of a row and a key there are, the rows being the last `rows` of `keys` tokens.

    Args:
        causal: whether a row sees only its own token and those before it.
        window: the most recent keys that a row sees, of a causal text; None for all.
    """
    if not causal:
        return float(rows * keys)
    first, most = keys - rows + 1, min(window or keys, keys)  # keys of the first row, and of the last ones
    growing = min(rows, max(0, most - first))
    return growing * first + growing * (growing - 1) / 2 + (rows - growing) * float(most)


def of_map(feature_map: FeatureMap, x: Tensor) -> tuple[int, float]:
    """Return the number of features F, and the operations of the matrix products for the tokens of `x`.

    Args:
        x: `[B, heads, t, D]`; its values do not matter.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        features = feature_map(x)
    return features.shape[-1], float(counted.get_total_flops())
