"""Map names to variants. A file of this folder that registers a class is imported without being named anywhere.

Other packages add variants through the entry-point group `hf_attnswap.attentions`: an entry names a module that
registers its classes when it is imported.
"""

import importlib
import logging
import pkgutil
import threading
from collections.abc import Callable
from importlib.metadata import entry_points

from .base import Attention, suggestion

log = logging.getLogger(__name__)

GROUP = "hf_attnswap.attentions"

_registered: dict[str, type[Attention]] = {}
# By suffix of the name: the class that is made from another one, or None where that one has none.
_derived: dict[str, Callable[[type[Attention]], type[Attention] | None]] = {}
_lock = threading.RLock()
_loaded = False


def register(cls: type[Attention]) -> type[Attention]:
    """Make a variant known under `cls.name`; a class decorator, which returns the class.

    Raises:
        ValueError: a name that is taken, or a name with +.
    """
    if "+" in cls.name:
        raise ValueError(f"attention {cls.name!r} is already taken: names with + are made from other variants")
    if cls.name in _registered and _registered[cls.name].__qualname__ != cls.__qualname__:
        raise ValueError(f"attention {cls.name!r} is already registered by {_registered[cls.name].__module__}")
    _registered[cls.name] = cls
    return cls


def derive(suffix: str, make: Callable[[type[Attention]], type[Attention] | None]) -> None:
    """Make the name of X + `suffix` known for every variant X of which `make` returns a class, the same at every call.

    Args:
        suffix: such as "+window".
        make: returns the class that is made from a variant, or None for a variant from which none can be made.
    """
    _derived[suffix] = make


def names() -> list[str]:
    """Return the names of all variants: controls first, then by cost, then those that are made from others."""
    load()
    order = sorted(_registered.values(), key=lambda cls: (not cls.control, cls.cost_class, cls.name))
    made = [f"{cls.name}{suffix}" for suffix, make in _derived.items() for cls in order if make(cls) is not None]
    return [*(cls.name for cls in order), *made]


def get(name: str) -> type[Attention]:
    """Return the class of a variant.

    Raises:
        ValueError: an unknown name; the error suggests the nearest one.
    """
    if not _loaded:
        load()
    base, plus, suffix = str(name).partition("+")
    cls = _registered.get(base)
    if cls is not None and plus:
        make = _derived.get(plus + suffix)
        cls = None if make is None else make(cls)
    if cls is None:
        known = names()
        raise ValueError(f"Unknown attention {name!r}.{suggestion(name, known)} Available: {', '.join(known)}")
    return cls


def load(again: bool = False) -> None:
    """Import every file of this folder and every entry point of other packages; once, unless `again`.

    An entry point that fails is logged as a warning and left out.
    """
    global _loaded
    if _loaded and not again:
        return
    with _lock:  # who comes second waits until all are there
        if _loaded and not again:
            return
        package = importlib.import_module(__package__)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{__package__}.{module.name}")
        for entry in entry_points(group=GROUP):
            try:
                entry.load()
            except Exception as error:  # whatever another package does wrong must not take the variants of this one
                source = entry.dist.name if entry.dist else "an unknown package"
                log.warning(
                    "the variants of entry point %s (%s, of %s) are missing: %s: %s",
                    entry.name, entry.value, source, type(error).__name__, error,
                )  # fmt: skip
        _loaded = True
