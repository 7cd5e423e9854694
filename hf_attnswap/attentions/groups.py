"""Run several variants in one layer, each on some of its key/value groups: the query heads that share keys and values.

Which groups keep softmax, and which get something cheaper, decides how much of a model's quality a swap keeps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masks import Mask, values_are_hidden
from .base import KINDS, Attention, Heads, State
from .softmax import Softmax

SPARE = 128  # tokens at most for which a step that finds no memory makes some, and else a quarter of the text


class Groups(Attention):
    """Hold one variant for each of several sets of key/value groups of a layer; no variant of its own, without a name.

    Each part has parameters for its heads alone. Where one part keeps a state, the layer does: the other parts then
    keep their keys and values in that state, of their groups only.

    Attributes:
        parts: a variant for each set of groups. places: the groups of each part, in order.
    """

    formula = "each key/value group by its own variant"
    cost = "that of its variants"
    cost_class = "quadratic"
    source = "the plan"

    def __init__(self, heads: Heads, planned: Mapping[int, tuple[type[Attention], dict[str, Any]]]):
        """Make the parts of a layer.

        Args:
            heads: shape of the whole layer.
            planned: class and options of the variant of each group; groups that are absent run softmax.
        """
        super().__init__(heads)
        self.chosen = {group: (cls.name, options) for group, (cls, options) in planned.items()}
        by_choice: list[tuple[tuple[type[Attention], dict[str, Any]], list[int]]] = []
        for group in range(heads.num_key_value_heads):
            choice = planned.get(group, (Softmax, {}))
            own = next((groups for known, groups in by_choice if known == choice), None)
            if own is None:
                by_choice.append((choice, [group]))
            else:
                own.append(group)
        shared = heads.num_attention_heads // heads.num_key_value_heads
        parts: list[Attention] = []
        for (cls, options), groups in by_choice:
            shape = Heads(shared * len(groups), len(groups), heads.head_dim, heads.value_dim)
            parts.append(cls(shape, **options))
        self._hold(parts, [groups for _, groups in by_choice])

    def _hold(self, parts: Sequence[Attention], places: list[list[int]]) -> None:
        self.parts, self.places = nn.ModuleList(parts), places
        self.name = " and ".join(f"{part.name} in group{'s' * (len(at) > 1)} {_listed(at)}" for part, at in self.each())
        self.stateful = any(part.stateful for part in parts)
        self.any_mask = all(part.any_mask for part in parts)
        self.slides = all(part.any_mask or part.slides for part in parts)
        self.unrotate = any(part.unrotate for part in parts)
        self.kinds = tuple(kind for kind in KINDS if all(kind in part.kinds for part in parts))
        self.ops = tuple(dict.fromkeys(op for part in parts for op in part.ops))
        self.family = next((part.family for part in parts if part.family != "plain"), "plain")

    def each(self) -> list[tuple[Attention, list[int]]]:
        """Return every part with its groups."""
        return list(zip(self.parts, self.places, strict=True))

    @property
    def linear_branch(self) -> "Groups | None":
        """Return the same layer with the linear branch alone where a part has one; None where none has."""
        branches = [part.linear_branch for part in self.parts]
        if all(branch is None for branch in branches):
            return None
        alone = Groups.__new__(Groups)
        Attention.__init__(alone, self.heads)
        alone._hold([branch or part for branch, part in zip(branches, self.parts, strict=True)], self.places)
        return alone

    def choice(self) -> dict[int, tuple[str, dict[str, Any]]]:
        """Return name and options of the variant of each group that does not run softmax."""
        return {group: (name, dict(options)) for group, (name, options) in self.chosen.items()}

    def reset_parameters(self) -> None:
        for part in self.parts:
            part.reset_parameters()

    def weights(self, query, key, mask, scaling):
        outs = []
        for part, groups in self.each():
            q, k = self._take(query, groups), self._take(key, groups)
            outs.append(part.weights(q, k, self._mask_of(mask, groups), scaling))
        return self._in_order(outs)

    def calibrate(self, query, key, value, mask, scaling):
        for part, groups in self.each():
            own = (self._take(t, groups) for t in (query, key, value))
            part.calibrate(*own, self._mask_of(mask, groups), scaling)

    def operations(self, rows, keys, window=None):
        return sum(part.operations(rows, keys, window) for part in self.parts)

    def whole_state(self, state, tokens):
        found: dict[str, Tensor] = {}
        for number, part in enumerate(self.parts):
            own = _part_of(state, number)
            if part.stateful:
                own = part.whole_state(own, tokens)
            else:
                own = {name: F.pad(t, (0, 0, 0, tokens - t.shape[2])) for name, t in own.items()}
            found |= _named(own, number)
        return found

    def forward(self, query, key, value, mask, scaling, state=None):
        outs = []
        for number, (part, groups) in enumerate(self.each()):
            q, k, v = (self._take(t, groups) for t in (query, key, value))
            given, own = self._mask_of(mask, groups), None
            if state is not None:
                own = State(_part_of(state, number))
                if not part.stateful:
                    k, v, given = _with_past(own, k, v, given)
            outs.append(part(q, k, v, given, scaling, own if part.stateful else None))
            if own is not None:
                state.update(_named(own, number))
        return self._in_order(outs)

    def _take(self, t: Tensor, groups: list[int]) -> Tensor:
        """Return the heads of these groups of `[B, H or Hkv, ...]`, a view where they stand side by side."""
        size = t.shape[1] // self.heads.num_key_value_heads
        if groups == list(range(groups[0], groups[-1] + 1)):
            return t[:, groups[0] * size : (groups[-1] + 1) * size]
        return torch.cat([t[:, group * size : (group + 1) * size] for group in groups], dim=1)

    def _mask_of(self, mask: Mask, groups: list[int]) -> Mask:
        return mask if mask.plain else mask.for_heads(lambda t: self._take(t, groups))

    def _in_order(self, outs: list[Tensor]) -> Tensor:
        """Return the parts' results `[B, H of the part, ...]` as one, the heads in the order of the layer."""
        at: dict[int, Tensor] = {}
        for out, groups in zip(outs, self.places, strict=True):
            at |= dict(zip(groups, out.chunk(len(groups), dim=1), strict=True))
        # Put side by side as the model's output projection reads them, without another copy.
        by_token = [at[group].transpose(1, 2) for group in range(self.heads.num_key_value_heads)]
        return torch.cat(by_token, dim=2).transpose(1, 2)

    def extra_repr(self) -> str:
        return self.name


def _part_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return what the state of a layer holds for one of its parts."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _named(own: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return what one part holds as the state of a layer has it."""
    return {f"{number}.{name}": t for name, t in own.items()}


def _with_past(state: State, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
    """Return keys and values of all tokens, `[B, Hkv, S, *]`, and the mask for these; the new ones enter the state.

    The tensors of the state may have memory for more tokens than have come, into which the new ones are written.
    """
    new = {"key": key, "value": value}
    if mask.room is not None:
        for name, t in new.items():
            state[name].index_copy_(2, mask.room.at, t)
        allowed = mask.room.allowed
        return state["key"], state["value"], Mask(1, allowed.shape[1], allowed)
    past, length = mask.offset, mask.key_length
    if not state:
        state.update(new)
        return key, value, mask
    written = torch.is_inference_mode_enabled() or not state["key"].is_inference()
    if not written or state["key"].shape[2] < length:
        # Where each step's keys are held, for a gradient or in a program, memory to spare is never filled.
        spare = 0 if torch.is_grad_enabled() or values_are_hidden() else min(SPARE, length // 4)
        for name, t in new.items():
            more = [t.new_empty(*t.shape[:2], spare, t.shape[3])] if spare else []
            state[name] = torch.cat([state[name][:, :, :past], t, *more], 2)
    else:
        for name, t in new.items():
            state[name][:, :, past:length] = t
    return state["key"][:, :, :length], state["value"][:, :, :length], mask


def _listed(groups: list[int]) -> str:
    return ", ".join(map(str, groups))
