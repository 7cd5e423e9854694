"""Read off how an attention module rotates queries and keys by position, so that a variant can undo it.

A module of transformers is called with `position_embeddings=(cos, sin)` and hands both to the function
`apply_rotary_pos_emb` of its own file, some under a condition. The families differ in which numbers make a pair and in
how cos and sin list the pairs: the function itself is asked, on numbers that are made up.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..masks import Rotation, values_are_hidden
from .cache import OnceForAllLayers
from .sources import source_of

Given = tuple[Tensor, Tensor]  # cos and sin, as the module is called with them
_ADVICE = "leave unrotate out"
Condition = tuple[str, bool]  # an expression of the module's source, and what it has to be


class Rotary(NamedTuple):
    """Say how a module rotates.

    Attributes:
        function: `(q, k, cos, sin)` or `(q, cos, sin)` -> what is rotated.
        place: that of `position_embeddings` among the arguments of the module.
        last: whether the last numbers of a head are rotated, where not all are.
    """

    function: Callable
    place: int
    last: bool


def rotary_of(module: nn.Module, kind: str) -> Rotary | None:
    """Return how an attention module rotates its queries and keys; None where it does not.

    Args:
        kind: of attention.

    Raises:
        NotImplementedError: it does so in a way that is not known here.
    """
    name = type(module).__name__
    calls, place, norms = _calls_of(type(module))
    for norm in norms:  # one with weights does not commute with a rotation
        if next(getattr(module, norm).parameters(), None) is not None:
            raise NotImplementedError(f"{name} has {norm} behind its rotation, which cannot be undone: {_ADVICE}")
    known = {"self": module, "position_embeddings": (), "is_cross_attention": kind == "cross", "__builtins__": {}}
    for function, conditions in calls:
        for expression, expected in conditions:
            try:
                holds = bool(eval(expression, known)) == expected  # it stands in the source of the module
            except Exception as error:
                raise NotImplementedError(
                    f"{name} rotates queries and keys if {expression}, which cannot be told here: {_ADVICE}"
                ) from error
            if not holds:
                break
        else:
            # Where keys are latent, what is rotated stands behind what is not.
            return Rotary(function, place, hasattr(module, "qk_rope_head_dim"))
    return None


@functools.cache
def _calls_of(
    cls: type[nn.Module],
) -> tuple[tuple[tuple[Callable, tuple[Condition, ...]], ...], int, tuple[str, ...]]:
    """Return what may rotate queries in a class, each function with its conditions; `Rotary.place`; norms behind it.

    Raises:
        NotImplementedError: it rotates in another way.
    """
    written = "".join(source_of(base) for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins")))
    if not re.search(r"rotar|rotate_|(?<![a-z])rope|freqs", written, re.I):
        return (), -1, ()
    forward = inspect.unwrap(cls.forward)
    try:
        source = textwrap.dedent(inspect.getsource(forward))
        arguments = list(inspect.signature(forward).parameters.values())[1:]
        calls = [(forward.__globals__[f], c) for f, c in _calls(ast.parse(source).body, ())]
    except (OSError, TypeError, ValueError, KeyError):
        calls = []
    place = next((i for i, a in enumerate(arguments) if a.name == "position_embeddings"), None) if calls else None
    if place is None or not re.search(r"\bcos, sin = position_embeddings$", source, re.M):
        raise NotImplementedError(
            f"{cls.__name__} rotates queries and keys in a way that cannot be undone here: {_ADVICE}"
        )
    if not any(a.kind is a.VAR_KEYWORD for a in arguments):
        raise NotImplementedError(f"{cls.__name__} takes no more keywords, such as its rotation: {_ADVICE}")
    behind = source[source.rindex("cos, sin") :]
    return tuple(calls), place, tuple(re.findall(r"^ *q\w* = self\.(\w*norm\w*)\(", behind, re.M))


def _calls(body: Sequence[ast.AST], conditions: tuple[Condition, ...]) -> Iterator[tuple[str, tuple[Condition, ...]]]:
    """Yield the name of each function that rotates a query by `cos` and `sin`, with the conditions of its call."""
    for node in body:
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            yield from _calls(node.body, (*conditions, (test, True)))
            yield from _calls(node.orelse, (*conditions, (test, False)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "rot" in node.func.id:
            names = [arg.id for arg in node.args if isinstance(arg, ast.Name)]
            if names and names[0].startswith("q") and names[-2:] == ["cos", "sin"]:
                yield node.func.id, conditions
        else:
            yield from _calls(list(ast.iter_child_nodes(node)), conditions)


def given_to(rotary: Rotary, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """Return the `position_embeddings` of a call of a module; None where there are none."""
    return kwargs.get("position_embeddings", args[rotary.place] if len(args) > rotary.place else None)


def rotation_of(rotary: Rotary, given: Given, query: Tensor, length: int) -> Rotation:
    """Return the rotation of the queries and keys that a module hands to its attention function.

    Args:
        given: what `given_to` returned. query: `[B, H, *, D]`. length: T, the number of keys.

    Raises:
        NotImplementedError: it is not known here, or cos and sin are not of these tokens.
    """
    cos = given[0][None] if given[0].dim() == 2 else given[0]
    batch, dim = query.shape[0], query.shape[3]
    layout = _layout(rotary.function, cos.shape[-1], dim)
    if layout is None or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != length:
        raise NotImplementedError(
            f"its rotation by position, with cos of shape {tuple(cos.shape)} for {batch} rows of {length} tokens of "
            f"{dim} numbers each, cannot be undone here: {_ADVICE}"
        )
    listed, neighbours = layout
    turns = _turns(listed, *given) if values_are_hidden() else _TURNS[listed](*given)
    start = dim - turns.shape[-1] if rotary.last else 0
    return Rotation(turns.expand(batch, -1, -1), neighbours, start)


# How cos and sin may list the pairs: how to read and how to write such a list.
_LISTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "all twice": (lambda x: x[..., : x.shape[-1] // 2], lambda c: torch.cat([c, c], -1)),
    "each twice": (lambda x: x[..., ::2], lambda c: c.repeat_interleave(2, -1)),
    "once": (lambda x: x, lambda c: c),
}


def _turns(listed: str, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the `turns` of a `Rotation`, `[1 or B, T, 2 P]`, from lists `[1 or B, T, *]` or `[T, *]`."""
    c, s = (_LISTS[listed][0](t).to(torch.promote_types(t.dtype, torch.float32)) for t in (cos, sin))
    turns = (torch.cat([c, s], dim=-1) / torch.cat([c.square() + s.square()] * 2, dim=-1)).to(cos.dtype)
    return turns[None] if turns.dim() == 2 else turns


_TURNS = {listed: OnceForAllLayers(functools.partial(_turns, listed)) for listed in _LISTS}


@torch.compiler.assume_constant_result
def _layout(function: Callable, given: int, dim: int) -> tuple[str, bool] | None:
    """Return how a function rotates queries of `dim` numbers by cos and sin of `given` numbers; None if no way fits.

    Returns:
        One of `_LISTS`, and whether the numbers 2 p and 2 p + 1 make a pair.
    """
    return _tried(function, given, dim)


@functools.cache
@torch.no_grad()
def _tried(function: Callable, given: int, dim: int) -> tuple[str, bool] | None:
    """Return what `_layout` returns, by a try of each way that there is."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, 5, dim, generator=generator)
        for listed, (_, write) in _LISTS.items():
            angles = torch.randn(1, 5, given if listed == "once" else given // 2, generator=generator)
            cos, sin = angles.cos(), angles.sin()
            for y, whole in _rotated(function, x, write(cos), write(sin)):
                # Some rotate neighbours and then put the first of all pairs before the second.
                apart = torch.cat([whole[..., ::2], whole[..., 1::2]], -1)
                for neighbours in (False, True) if 2 * cos.shape[-1] <= whole.shape[-1] else ():
                    undone = Rotation(torch.cat([cos, sin], -1), neighbours).undo(y)
                    if any(torch.allclose(undone, t, atol=1e-5) for t in (whole, apart)):
                        return listed, neighbours
    return None


def _rotated(function: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a function makes of x `[1, H, T, D]`, and x, by each of the ways in which it may be called."""
    two = "k" in inspect.signature(function).parameters
    for width in dict.fromkeys((x.shape[-1], cos.shape[-1])):
        given = x[..., :width]
        for turned, c, s in ((False, cos, sin), (True, cos[0], sin[0]), (False, cos[0], sin[0])):
            q = given[0].transpose(0, 1) if turned else given
            try:
                y = function(q, q, c, s)[0] if two else function(q, c, s)
            except Exception:  # not by this way
                continue
            y = y.transpose(0, 1)[None] if turned else y
            if y.shape == given.shape:
                yield y, given
