"""Look up generated tasks by name; a file of this folder that registers a class is discovered automatically."""

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points

from ...errors import UsageError
from .base import Task

_registered: dict[str, type[Task]] = {}


def register(cls: type[Task]) -> type[Task]:
    """Register a task under `cls.name`, as a class decorator.

    Raises:
        ValueError: another task has the name.
    """
    if cls.name in _registered and _registered[cls.name].__qualname__ != cls.__qualname__:
        raise ValueError(f"task {cls.name!r} is already registered by {_registered[cls.name].__module__}")
    _registered[cls.name] = cls
    return cls


def names() -> list[str]:
    """Return the names of the generated tasks in alphabetical order."""
    _load()
    return sorted(_registered)


def get(name: str) -> Task:
    """Return the task of this name with its options at their defaults.

    Raises:
        UsageError: an unknown name; the message suggests the nearest one.
    """
    if name not in names():
        raise unknown(name)
    return _registered[name]()


def unknown(name: str, reason: str = "") -> UsageError:
    """Return the error for a name that is no task, which lists the known names and suggests the nearest one.

    Args:
        reason: words put at the end of the message.
    """
    close = difflib.get_close_matches(name, names(), n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"Unknown task {name!r}.{meant} Available: {_listed()}{reason}")


def help_text() -> str:
    """Return what `--tasks` takes, for the help of commands."""
    return f"with commas between: {_listed()}"


def _listed() -> str:
    return f"{', '.join(names())}, .jsonl files, tasks of lm-eval"


def _load() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    for entry in entry_points(group="hf_attnswap.tasks"):
        entry.load()
