"""Run something when a module is imported, or at once if it already is."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


class _WhenImported:
    """A finder that finds nothing itself: it appends a callback to the module that another finder found."""

    def __init__(self, name: str, callback: Callable[[], None]):
        self.name, self.callback = name, callback

    def find_spec(self, fullname: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        after = sys.meta_path[sys.meta_path.index(self) + 1 :]
        others = (finder for finder in after if hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_then_call(module: ModuleType) -> None:
            exec_module(module)
            sys.meta_path.remove(self)
            self.callback()

        spec.loader.exec_module = exec_then_call
        return spec


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call `callback` once, right after the body of module `name` has run.

    Args:
        name: Absolute module name.
        callback: Takes nothing; what it raises comes out of the import statement.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _WhenImported(name, callback))
