"""The key/value groups of a model that a plan chooses among, by the names that `swap(keep=...)` takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attentions import Heads
from ..config import SwapConfig
from ..errors import UsageError
from ..integration.finding import AttentionModule, inspect, swappable
from ..integration.heads import heads_of
from ..integration.reach import passes


@dataclass(frozen=True)
class Layer:
    """Describe an attention module whose groups are candidates.

    Attributes:
        path: of the module in the model.
        index: of the layer, as `swap(layers=...)` counts it.
        heads: shape of the module; a group is a key/value head with the query heads that share it.
        places: for each group, its place among the candidates.
    """

    path: str
    index: int
    heads: Heads
    places: tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """Hold the candidates of a plan: the key/value groups of all layers that see the whole text.

    Layers with a sliding window or chunks stay as they are. Where several parts or kinds of attention have a layer of
    one number, as encoder and decoder have, a name stands for the group in all of them, as it does for `swap`.

    Attributes:
        names: "layer.group", in the order of the layers.
        layers: the attention modules.
        attention, options, kinds: what takes the place of softmax where a group is not kept, as in `SwapConfig`.
        chosen: indices of the layers, None where that is all of the model.
    """

    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    attention: str
    options: dict[str, Any]
    kinds: tuple[str, ...]
    chosen: list[int] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.names)

    def config(self, kept: Sequence[int]) -> SwapConfig:
        """Return the swap that keeps softmax in the candidates at these places."""
        return SwapConfig(
            self.attention,
            layers=self.chosen,
            options=dict(self.options),
            kinds=self.kinds,
            keep=[self.names[place] for place in sorted(kept)] or None,
        )

    def by_layer(self) -> dict[int, list[int]]:
        """Return the places of the candidates of each layer, by its index."""
        found: dict[int, list[int]] = {}
        for place, name in enumerate(self.names):
            found.setdefault(int(name.partition(".")[0]), []).append(place)
        return found


def find_groups(
    model: PreTrainedModel, attention: str, options: dict[str, Any], kinds: Sequence[str] = SwapConfig.kinds
) -> Groups:
    """Return the candidates of a model that is not swapped.

    Args:
        attention: name of the variant that stands where softmax is not kept.
        options: its options.
        kinds: which attention: "causal", "bidirectional" or "cross".

    Raises:
        UsageError: as `swap`; or no layer sees the whole text, or the heads of one cannot be read.
    """
    found = swappable(model, inspect(model), tuple(kinds))
    entries = [entry for modules in found.values() for _, entry in sorted(modules.items())]
    whole = [entry for entry in entries if not passes(entry)]
    if not whole:
        raise UsageError(
            f"{type(model).__name__} has no layer that sees the whole text, so there is nothing to plan: each sees no "
            f"more than {entries[0].reach}"
        )
    layers: list[tuple[AttentionModule, Heads]] = []
    for entry in whole:
        heads = heads_of(entry.module)
        if heads is None:
            raise UsageError(
                f"{type(model).__name__} cannot be planned: the heads of {entry.name} ({entry.class_name}) "
                "cannot be read"
            )
        layers.append((entry, heads))
    names = sorted({(entry.layer, group) for entry, heads in layers for group in range(heads.num_key_value_heads)})
    places = {name: place for place, name in enumerate(names)}
    return Groups(
        names=tuple(f"{layer}.{group}" for layer, group in names),
        layers=tuple(
            Layer(
                entry.name,
                entry.layer,
                heads,
                tuple(places[entry.layer, group] for group in range(heads.num_key_value_heads)),
            )
            for entry, heads in layers
        ),
        attention=attention,
        options=dict(options),
        kinds=tuple(kinds),
        chosen=None if len(whole) == len(entries) else sorted({entry.layer for entry in whole}),
    )


def by_heads(of_groups: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return the numbers of a layer's groups for its query heads, `[1, H, 1, 1]`.

    Args:
        of_groups: one number per candidate, `[n]`.
    """
    shared = layer.heads.num_attention_heads // layer.heads.num_key_value_heads
    return of_groups[list(layer.places)].repeat_interleave(shared)[None, :, None, None]
