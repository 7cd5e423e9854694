"""Several texts in one row, taken apart into rows of their own and put back."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


def unpack_rows(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *beside: Tensor,
) -> Tensor:
    """Run `attend` on every text by itself.

    Texts are grouped by the next power of two of their length, so that at most half of what is computed is padding
    (at the end of a row).

    Args:
        attend: query `[b, H, t, D]`, key and value `[b, Hkv, t, *]`, valid bool `[b, t]`, and of each `beside` what
            belongs to these tokens, `[b, t, E]` -> `[b, H, t, Dv]`.
        segments: int `[B, n]`; the tokens of a row with equal numbers are one text, 0 is padding.
        beside: more of each token, `[B, n, E]`.

    Returns:
        `[B, H, n, Dv]`; zero at padding.
    """
    batch, length = segments.shape
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for row in range(batch):
        for segment in segments[row].unique().tolist():
            if segment:
                tokens = (segments[row] == segment).nonzero().squeeze(1) + row * length
                groups[1 << (len(tokens) - 1).bit_length()].append(tokens)
    flat = [t.transpose(1, 2).reshape(batch * length, t.shape[1], t.shape[3]) for t in (query, key, value)]
    out = query.new_zeros(batch * length, query.shape[1], value.shape[3])
    for texts in groups.values():
        index = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)
        real = index >= 0
        index = index.clamp(min=0)
        more = (t.flatten(0, 1)[index] for t in beside)
        result = attend(*(t[index].transpose(1, 2) for t in flat), real, *more).transpose(1, 2)
        out = out.index_put((index[real],), result[real])
    return out.unflatten(0, (batch, length)).transpose(1, 2)
