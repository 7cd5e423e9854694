"""The one place that chooses which implementation of an op runs.

An op has a form for each backend that implements it: `torch`, portable and fast, and `reference`, the formula over
whole matrices. A native kernel is one more form with one more name in `BACKENDS`. The first backend that can serve a
call runs; HF_ATTNSWAP_BACKEND, read when the package is imported, puts one in front. A form that cannot serve a call is
passed over with a warning, once per reason.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Best first.
BACKENDS = ("torch", "reference")
VARIABLE = "HF_ATTNSWAP_BACKEND"
OPS: dict[str, "Op"] = {}

_warned: set[tuple[str, str, str]] = set()
_ran: dict[str, set[str]] = {}


class Op:
    """An operation under its name, with a form for each backend that has one."""

    def __init__(self, name: str):
        self.name = name
        self.forms: dict[str, tuple[Callable, Callable[..., str | None] | None]] = {}
        OPS[name] = self

    def form(self, backend: str, unfit: Callable[..., str | None] | None = None) -> Callable[[Callable], Callable]:
        """Register a form: a decorator.

        Args:
            unfit: called with the arguments of the op; why the form cannot serve them (dtype, device, mask, shape),
                or None. Not given for a form that serves every call.
        """
        if backend not in BACKENDS:
            raise ValueError(f"{self.name}: backend {backend!r} is not one of {', '.join(BACKENDS)}")

        def register(run: Callable) -> Callable:
            self.forms[backend] = run, unfit
            return run

        return register

    def __call__(self, *arguments):
        for backend in _order:
            run, unfit = self.forms.get(backend, (None, None))
            if run is None:
                reason = "it has no such form"
            else:
                reason = None if unfit is None else unfit(*arguments)
            if reason is None:
                if not torch.compiler.is_compiling():
                    _ran.setdefault(self.name, set()).add(backend)
                return run(*arguments)
            _pass_over(self.name, backend, reason)
        raise NotImplementedError(f"{self.name}: no backend of {', '.join(_order)} can serve this call")


def in_large_kernels(x: Tensor) -> bool:
    """Whether the portable forms take long texts in a few large kernels instead of in blocks for a CPU's cache."""
    return torch.compiler.is_compiling() or x.device.type != "cpu"


def _pass_over(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _warned:
        _warned.add((op, backend, reason))
        log.warning("%s: backend %s is passed over: %s", op, backend, reason)


def _ordered(forced: str | None) -> tuple[str, ...]:
    if not forced:
        return BACKENDS
    if forced not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {forced!r}; expected one of {', '.join(BACKENDS)}")
    return (forced, *(b for b in BACKENDS if b != forced))


_order = _ordered(os.environ.get(VARIABLE))


def order() -> tuple[str, ...]:
    """Backends in the order in which they are tried."""
    return _order


def backends_of(op: str) -> list[str]:
    """Backends that have a form of this op, in the order in which they are tried."""
    return [name for name in _order if name in OPS[op].forms]


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within it, `name` is tried first, as if HF_ATTNSWAP_BACKEND had said so; None: the usual order.

    Raises:
        ValueError: an unknown backend.
    """
    global _order
    before, _order = _order, _ordered(name)
    try:
        yield
    finally:
        _order = before


@contextmanager
def watch() -> Iterator[dict[str, set[str]]]:
    """Collects, within it, the backends that ran: by name of the op."""
    global _ran
    before, _ran = _ran, {}
    try:
        yield _ran
    finally:
        for op, ran in _ran.items():
            before.setdefault(op, set()).update(ran)
        _ran = before


def told(ran: dict[str, set[str]]) -> str:
    """What `watch` collected, in words."""
    return ", ".join(f"{op} {' and '.join(sorted(backends))}" for op, backends in sorted(ran.items()))
