"""Act on a package that others may import later, without importing it."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Call `act` as soon as the package `name` has been imported: now, or at the end of its first import."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Waiting(name, act))


class _Waiting(MetaPathFinder):
    """Find one package as the other finders do, and act when its code has run."""

    def __init__(self, name: str, act: Callable[[], None]):
        self.name, self.act = name, act

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            sys.meta_path.remove(self)
            self.act()

        spec.loader.exec_module = exec_module
        return spec
