"""Choose which implementation of an op runs; no other file does.

A form is a file in the folder of its op, named after its backend. A form has

    run(*arguments)             the arguments of the op, in order; returns the same as every other form
    devices = ("cuda",)         optional: the device types on which the form runs; all of them by default
    dtypes = (torch.float32,)   optional: the dtypes that the first argument may have; all of them by default
    unfit(*arguments)           optional: why the form cannot serve this call, in words, or None
    available()                 optional: why the form cannot run on this machine, in words, or None; called on import

Native forms are tried first, then `torch`, then `reference`; forms named `onnx` write nodes of a graph and run only
where they are forced, by an export. An op without a form for a backend, or without one for
the device of the call, says nothing. A form that cannot run on this machine is named once at WARNING, with the one
that runs in its place; a form that is passed over for another reason is logged once at INFO.
HF_ATTNSWAP_BACKEND, read when the first op is called, forces a backend: `torch` for all ops that have such a form,
`scores=torch,linear=reference` for some. A forced form that cannot serve a call refuses that call.
"""

import importlib
import logging
import os
import pkgutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UsageError

log = logging.getLogger(__name__)

VARIABLE = "HF_ATTNSWAP_BACKEND"
OPS: dict[str, "Op"] = {}

# After every native backend.
_PORTABLE = ("torch", "reference")
# Only where it is forced.
_OF_GRAPHS = "onnx"
_ALL = "all ops"

_logged: set[tuple[str, ...]] = set()
_logging = threading.Lock()


class _Here(threading.local):
    """Hold the settings of one thread: forced backends by op (or `_ALL`), and the dictionary that `watch` fills.

    The class holds what HF_ATTNSWAP_BACKEND forces in every thread; None until it is read.
    """

    forced: Mapping[str, str] | None = None
    ran: dict[str, set[str]] | None = None


_here = _Here()


class Form:
    """Describe one implementation of an op, loaded from the file of its backend in the folder of the op.

    Attributes:
        backend: name of the backend and of the file, such as "torch".
        missing: why the form cannot run on this machine, in words (a module that is not installed, or what `available`
            returned); None where the form can run.
        run, devices, dtypes, unfit: as the file defines them (see the top of this file); None where it does not.

    Raises:
        TypeError: the file has no function `run`.
    """

    def __init__(self, package: str, backend: str):
        self.backend = backend
        self.missing: str | None = None
        try:
            module: Any = importlib.import_module(f"{package}.{backend}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(__package__):
                raise
            self.missing = f"{error.name} is not installed"
            module = None
        self.run = getattr(module, "run", None)
        self.devices = getattr(module, "devices", None)
        self.dtypes = getattr(module, "dtypes", None)
        self.unfit = getattr(module, "unfit", None)
        if module is not None and self.run is None:
            raise TypeError(f"{module.__file__} has no function run, which makes it a form of an op")
        if hasattr(module, "available"):
            self.missing = module.available()

    def runs_on(self, device: str) -> bool:
        """Return whether the form runs on the device type `device`, such as "cuda"; any where the file names none."""
        return self.devices is None or device in self.devices

    def refusal(self, arguments: tuple) -> str | None:
        """Return why this form cannot serve a call with these arguments, in words; None if the form can.

        Checked in this order: the machine, the device and the dtype of the first argument, then what `unfit` says.
        """
        if self.missing is not None:
            return self.missing
        given = arguments[0]
        if self.devices is not None and given.device.type not in self.devices:
            return f"it runs on {', '.join(self.devices)}, not on {given.device.type}"
        if self.dtypes is not None and given.dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, not {given.dtype}"
        return None if self.unfit is None else self.unfit(*arguments)


class Op:
    """Hold an operation and its forms; call an `Op` to run the first form that can serve the arguments.

    Each op is made once, in the `__init__.py` of its folder: `_op = Op(__name__)`. The first argument of a call is a
    tensor, whose device and dtype take part in the choice. All arguments are positional.

    Raises:
        NotImplementedError: on a call, the forced form cannot serve it, or no form can.
    """

    def __init__(self, package: str):
        self.package = package
        self.name = package.rpartition(".")[2]
        self.discover()
        OPS[self.name] = self

    def discover(self) -> None:
        """Load the forms from the folder of the op into `forms`, by backend, in the order in which a call tries them.

        Called when the op is made; call it again after a file was added to the folder.
        """
        path = sys.modules[self.package].__path__
        found = {m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")}
        order = [*sorted(found.difference(_PORTABLE)), *(b for b in _PORTABLE if b in found)]
        self.forms = {backend: Form(self.package, backend) for backend in order}

    def __call__(self, *arguments):
        """Run the first form that can serve the arguments, and return its output.

        Raises:
            NotImplementedError: the forced form cannot serve the call, or no form can.
        """
        form = self._choose(arguments)
        ran = _here.ran
        if ran is not None and not torch.compiler.is_compiling():
            ran.setdefault(self.name, set()).add(form.backend)
        return form.run(*arguments)

    def _choose(self, arguments: tuple) -> Form:
        """Return the forced form, or else the first one that can serve the arguments."""
        forced = _forced()
        if forced:
            form = self.forms.get(forced.get(self.name) or forced.get(_ALL))
            if form is not None:
                reason = form.refusal(arguments)
                if reason is not None:
                    raise NotImplementedError(
                        f"{self.name}: {VARIABLE} asks for backend {form.backend}, which cannot serve this call: "
                        f"{reason}"
                    )
                return form
        device = arguments[0].device.type
        wanting = None  # made for this device, and cannot run on this machine
        for form in self.forms.values():
            if form.backend == _OF_GRAPHS or not form.runs_on(device):
                continue
            reason = form.refusal(arguments)
            if reason is None:
                if wanting is not None:
                    _log_once(
                        logging.WARNING, "backend %s runs, not %s: %s", form.backend, wanting.backend, wanting.missing
                    )
                return form
            if not torch.compiler.is_compiling():
                if form.missing is not None and form.devices is not None:
                    wanting = form
                else:
                    _log_once(logging.INFO, "%s: backend %s is passed over: %s", self.name, form.backend, reason)
        raise NotImplementedError(f"{self.name}: no backend of {', '.join(self.forms)} can serve this call")


def _log_once(level: int, *line: str) -> None:
    """Log a line, a format and what stands in it, once per process."""
    with _logging:
        if line in _logged:
            return
        _logged.add(line)
    log.log(level, *line)


def _parse(text: str | None) -> dict[str, str]:
    """Return backends by op from `torch` or `scores=torch,linear=reference`; a backend without an op stands at `_ALL`.

    Raises:
        UsageError: an op or a backend that does not exist, or an op that is named twice.
    """
    forced: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        op, _, backend = (p.strip() for p in part.rpartition("="))
        if op and op not in OPS:
            raise UsageError(f"{VARIABLE}={text}: there is no op {op!r}; the ops are {', '.join(sorted(OPS))}")
        known = sorted({b for o in ([OPS[op]] if op else OPS.values()) for b in o.forms})
        if backend not in known:
            raise UsageError(
                f"{VARIABLE}={text}: {f'op {op} has no' if op else 'no op has a'} backend {backend!r}; "
                f"expected one of {', '.join(known)}"
            )
        if (op or _ALL) in forced:
            raise UsageError(f"{VARIABLE}={text}: two backends for {op or _ALL}; name one")
        forced[op or _ALL] = backend
    return forced


def _forced() -> Mapping[str, str]:
    here = _here.forced
    if here is None:
        here = _parse(os.environ.get(VARIABLE))
        if not torch.compiler.is_compiling():  # a change that a compiled graph would be guarded against
            _Here.forced = here
    return here


def forced() -> dict[str, str]:
    """Return the backends that are forced in this thread, by name of the op or by "all ops".

    Raises:
        UsageError: HF_ATTNSWAP_BACKEND names an op or a backend that does not exist.
    """
    return dict(_forced())


def backends_of(op: str) -> list[str]:
    """Return the backends that have a form of the op named `op`, in the order in which this thread tries them.

    Raises:
        KeyError: an op that does not exist.
        UsageError: HF_ATTNSWAP_BACKEND names an op or a backend that does not exist.
    """
    first = _forced().get(op) or _forced().get(_ALL)
    there = (backend for backend in OPS[op].forms if backend != _OF_GRAPHS or backend == first)
    return sorted(there, key=lambda backend: backend != first)


def on_machine(op: str, device: str) -> list[dict[str, str | None]]:
    """Return the forms of an op for a type of device, in the order in which this thread tries them.

    Each is a dict of its `backend` and, where it cannot run on this machine, the reason `missing`, else None. Where one
    is forced it stands alone: it refuses what it cannot serve.

    Raises:
        KeyError: an op that does not exist.
        UsageError: HF_ATTNSWAP_BACKEND names an op or a backend that does not exist.
    """
    order = backends_of(op)
    first = OPS[op].forms[order[0]]
    order = order[:1] if first.backend in (_forced().get(op), _forced().get(_ALL)) else order
    forms = [OPS[op].forms[backend] for backend in order]
    return [{"backend": f.backend, "missing": f.missing} for f in forms if f.runs_on(device)]


@contextmanager
def backend(text: str | None) -> Iterator[None]:
    """Force backends in this thread while the context is open, as HF_ATTNSWAP_BACKEND would.

    Args:
        text: what the variable would hold, such as `torch` or `scores=torch,linear=reference`; None restores the usual
            order.

    Raises:
        UsageError: an op or a backend that does not exist, or an op that is named twice.
    """
    before, _here.forced = vars(_here).get("forced"), _parse(text)
    try:
        yield
    finally:
        if before is None:  # as in every other thread again
            del _here.forced
        else:
            _here.forced = before


@contextmanager
def watch() -> Iterator[dict[str, set[str]]]:
    """Collect the backends that run in this thread while the context is open, by name of the op.

    Contexts may be nested: when the inner one closes, its backends are added to the outer one. Calls that torch.compile
    traces are not collected.
    """
    before, ran = _here.ran, {}
    _here.ran = ran
    try:
        yield ran
    finally:
        _here.ran = before
        if before is not None:
            for op, backends in ran.items():
                before.setdefault(op, set()).update(backends)


def told(ran: Mapping[str, Iterable[str]]) -> str:
    """Return in words what `watch` collected: "linear torch, scores reference and torch"."""
    return ", ".join(f"{op} {' and '.join(sorted(backends))}" for op, backends in sorted(ran.items()))
