"""The cache layer of a swapped attention in a `StaticCache`: its tensors stay where they are, and so do their sizes.

transformers compiles the steps of such a cache, and CUDA records them as a graph: a step asks the device for no number,
branches on none, and writes into memory that the first call allocated.
"""

import torch
from torch import Tensor

from ..attentions import Attention
from ..masks import Mask, Packed, Room, parse, split, values_are_hidden
from .cache import ANOTHER_PAST, UNDER_FUNC, Replay, StateLayer


class StaticStateLayer(StateLayer):
    """Hold the state of a stateful variant in tensors that are allocated once, at their full size.

    The first call of a text takes any number of tokens, as in a `StateLayer`. A call with one token after it is a step:
    the number of tokens is a tensor, and the token counts, whatever the mask says of it. Tokens cannot be taken back.

    Attributes:
        max_cache_len: the number of tokens for which there is room.
        length: the number of tokens that have come, int64 `[]`. seen: the same, which has to be fetched from a device.
        taken: which of the tokens the variant took in, bool `[B, max_cache_len]`.
        begun: whether tokens have come. pending: whether the variant has not taken the last of them in yet.
        continues: whether the variant has taken tokens in.
    """

    _layer_type = None
    is_compileable = True
    is_croppable = False
    begun = pending = continues = False

    def __init__(self, max_cache_len: int, beside_keys: bool = False):
        """Make an empty layer.

        Args:
            max_cache_len: the number of tokens for which there is room.
            beside_keys: whether other layers of the cache keep keys and values, for which masks are made too.
        """
        self.length = torch.zeros((), dtype=torch.long)
        super().__init__(beside_keys, max_cache_len)
        self.max_cache_len = max_cache_len

    @property
    def seen(self) -> int:
        return int(self.length)

    @seen.setter
    def seen(self, tokens: int) -> None:
        self.length.fill_(tokens)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first keys, and make room for what is known of each token."""
        super().lazy_initialization(key_states, value_states)
        self.length = self.length.to(self.device)
        self.taken = torch.zeros(len(key_states), self.max_cache_len, dtype=torch.bool, device=self.device)
        _stays(self.length)
        _stays(self.taken)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Count the new tokens, and return their keys and values as they came; errors as in `StateLayer.update`."""
        self._check_turn()
        if not self.begun and (self.taken is None or len(self.taken) != len(key_states)):
            self.lazy_initialization(key_states, value_states)
        self.length.add_(key_states.shape[-2])
        self.begun = self.pending = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask covers: those of the first call, or all for which there is room."""
        return self.mask_length or (self.max_cache_len if self.continues else query_length), 0

    def get_seq_length(self) -> Tensor | int:
        """Return how many tokens have come, as a tensor after the first."""
        return self.length if self.begun else 0

    def get_max_length(self) -> int:
        """Return the number of tokens for which there is room."""
        return self.max_cache_len

    def read(self, attention_mask, query_length, causal, window, asker):
        """Return what the mask of a call says; of a step, a mask of its token alone, with a `room`.

        Raises:
            NotImplementedError: a step of a layer with a sliding window that is smaller than the cache.
            ValueError: the mask of a step has not one column for each token for which there is room.
        """
        if query_length != 1 or not self.continues:
            seen = self.seen if self.continues else query_length
            return parse(attention_mask, query_length, seen, causal, longer=True, window=window, asker=asker)
        if window is not None and window < self.max_cache_len:
            raise NotImplementedError(
                f"its sliding window of {window} tokens is not known to a static cache: use the dynamic cache"
            )
        at = (self.length - 1)[None]
        if attention_mask is None:
            allowed = (torch.arange(self.max_cache_len, device=at.device) <= at)[None]
            return Mask(1, 1, room=Room(at, allowed.expand(len(self.taken), -1)))
        shape = tuple(attention_mask.shape)
        if len(shape) != 4 or shape[2:] != (1, self.max_cache_len):
            raise ValueError(
                f"attention_mask has shape {shape}, and a step of this static cache takes (batch, 1, 1, "
                f"{self.max_cache_len}): pass the model one row of 1 and 0 per text, or leave attention_mask out"
            )
        allowed, bias = split(attention_mask)
        if shape[1] != 1:
            return Mask(1, 1, dense=allowed[..., -1:])
        return Mask(1, 1, bias=bias, room=Room(at, allowed[:, 0, 0].expand(len(self.taken), -1)))

    def take_in(self, attention: Attention, mask: Mask | Packed, replay: Replay) -> None:
        """Note that the variant takes in the last tokens; see `StateLayer.take_in`. Nothing can be replayed."""
        self.awaited = False
        if not self._admits(attention, mask):
            self.pending = False
        elif mask.room is None:
            self._note(mask)
        else:
            self._note_step(mask.room)

    def _note(self, mask: Mask) -> None:
        """Note which tokens of a call count; NotImplementedError where the mask says another past."""
        before, seen = mask.offset, mask.key_length
        if seen > self.max_cache_len:
            raise NotImplementedError(f"{seen} tokens are more than the {self.max_cache_len} of the static cache")
        valid = torch.ones_like(self.taken[:, :seen]) if mask.valid is None else mask.valid.to(self.device)
        if before:
            _require((self.taken[:, :before] == valid[:, :before]).all(), ANOTHER_PAST)
        self.taken[:, before:seen] = valid[:, before:]

    def _note_step(self, room: Room) -> None:
        """Note that the token of a step counts; NotImplementedError where its mask says another past, or hides it."""
        column = torch.arange(self.max_cache_len, device=self.device)
        _require((room.at < self.max_cache_len).all(), f"the static cache has room for {self.max_cache_len} tokens")
        self.taken.logical_or_(column == room.at)
        _require(((self.taken == room.allowed) | (column > room.at)).all(), ANOTHER_PAST)

    def remembered(self) -> dict[str, Tensor]:
        """Return the state of the tokens taken in, in a dict of its own; empty where there are none."""
        return dict(self.state) if self.continues else {}

    def keep(self, attention: Attention, state: dict[str, Tensor]) -> None:
        """Write the state that `attention` has filled into the memory of the layer, which the first call allocates."""
        if self.continues:
            for name, tensor in state.items():
                _written(self.state[name], tensor)
        else:
            state = attention.whole_state(state, self.max_cache_len)
            self.state = {name: _written(self.state.get(name), tensor) for name, tensor in state.items()}
        self.continues, self.pending = True, False

    def _apply(self, change) -> None:
        self.state = {name: _written(t, change(t)) for name, t in self.state.items()}

    def _select(self, change, change_taken=None) -> None:
        self._apply(change)
        if self.taken is not None:
            self.taken = _written(self.taken, change(self.taken))

    def reset(self) -> None:
        """Forget everything but the memory, into which the next text goes."""
        self.length.zero_()
        self.begun = self.pending = self.continues = self.awaited = False
        self.filled_by = self.closed = ""

    def activate_past_recording(self) -> None:
        """Tokens cannot be taken back: `is_croppable` says so."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raise NotImplementedError, unless there is nothing to take back."""
        if tokens_to_remove:
            raise NotImplementedError(
                f"crop({tokens_to_remove}): a static cache of swapped layers cannot forget tokens: use the dynamic one"
            )


def _written(memory: Tensor | None, tensor: Tensor) -> Tensor:
    """Return `memory` with what `tensor` holds, or where that does not fit in place, memory of its own for `tensor`."""
    if memory is None or memory.shape != tensor.shape or memory.device != tensor.device:
        memory = tensor.detach().clone(memory_format=torch.contiguous_format)
        _stays(memory)
    elif memory is not tensor:
        memory.copy_(tensor)
    return memory


def _stays(memory: Tensor) -> None:
    """Tell torch.compile that a tensor never moves, without which it makes no graph of CUDA that writes there."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(memory)


def _require(condition: Tensor, otherwise: str) -> None:
    """Raise NotImplementedError where a condition does not hold; where nobody can look now, the device does later."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise NotImplementedError(UNDER_FUNC)
    if values_are_hidden() or condition.device.type != "cpu":
        torch._assert_async(condition, otherwise)
    elif not condition:
        raise NotImplementedError(otherwise)
