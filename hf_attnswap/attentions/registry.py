"""Names to variants. A file of this folder that registers a class is found without being named anywhere."""

import importlib
import pkgutil

from .base import Attention, suggestion
from .linear import LinearAttention

_registered: dict[str, type[Attention]] = {}


def register(cls: type[Attention]) -> type[Attention]:
    """Class decorator: make a variant known under `cls.name`. ValueError on a name that is taken."""
    if cls.name.endswith("+window"):
        raise ValueError(f"attention {cls.name!r} is already taken: names with +window are made from linear variants")
    if cls.name in _registered and _registered[cls.name].__qualname__ != cls.__qualname__:
        raise ValueError(f"attention {cls.name!r} is already registered by {_registered[cls.name].__module__}")
    _registered[cls.name] = cls
    return cls


def names() -> list[str]:
    """All names: controls first, then the variants by cost, then `X+window` for every linear one that has it."""
    _load()
    order = sorted(_registered.values(), key=lambda cls: (not cls.control, cls.cost_class, cls.name))
    hybrids = [f"{cls.name}+window" for cls in order if issubclass(cls, LinearAttention) and cls.hybrid]
    return [*(cls.name for cls in order), *hybrids]


def get(name: str) -> type[Attention]:
    """The class of a variant; ValueError, with a suggestion, for an unknown name."""
    known = names()
    if name not in known:
        raise ValueError(f"Unknown attention {name!r}.{suggestion(name, known)} Available: {', '.join(known)}")
    if name not in _registered:
        from .hybrid import hybrid_of  # the one place that needs the class, not only its name

        return hybrid_of(_registered[name.removesuffix("+window")])
    return _registered[name]


def _load() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
