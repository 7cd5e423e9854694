"""Names to generated tasks. A file of this folder that registers a class is found without being named anywhere."""

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points

from ...errors import UsageError
from .base import Task

_registered: dict[str, type[Task]] = {}


def register(cls: type[Task]) -> type[Task]:
    """Make a task known under `cls.name` (class decorator). ValueError for a name that is taken."""
    if cls.name in _registered and _registered[cls.name].__qualname__ != cls.__qualname__:
        raise ValueError(f"task {cls.name!r} is already registered by {_registered[cls.name].__module__}")
    _registered[cls.name] = cls
    return cls


def names() -> list[str]:
    """Return the names of the generated tasks, in the order of the alphabet."""
    _load()
    return sorted(_registered)


def get(name: str) -> Task:
    """Return the task with its options at their defaults. UsageError, with a suggestion, for an unknown name."""
    if name not in names():
        raise unknown(name)
    return _registered[name]()


def unknown(name: str, reason: str = "") -> UsageError:
    """Return the error for a name that is no task: the names there are, the nearest one, and what else `reason` says.

    Local files and tasks of lm-eval are named in it too.
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
