"""Look up the stages of training by name; a file of this folder that holds a `Stage` is discovered automatically."""

import importlib
import pkgutil

from ...attentions.base import suggestion
from ...errors import UsageError
from ..stage import Stage


def available() -> dict[str, type[Stage]]:
    """Return all stages by their names.

    Raises:
        ValueError: two stages have the same name.
    """
    stages: dict[str, type[Stage]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for value in vars(module).values():
            if not (isinstance(value, type) and issubclass(value, Stage) and value.__module__ == module.__name__):
                continue
            if value.name in stages:
                raise ValueError(f"stage {value.name!r} is in {stages[value.name].__module__} already")
            stages[value.name] = value
    return stages


def get(name: str) -> type[Stage]:
    """Return the stage of this name.

    Raises:
        UsageError: an unknown name; the message lists the known names.
    """
    known = available()
    if name not in known:
        raise UsageError(f"unknown stage {name!r}.{suggestion(name, known)} Stages: {', '.join(known)}")
    return known[name]
