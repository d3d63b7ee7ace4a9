"""Modules that are executed when they are first used, for processes that never use them."""

import importlib.util
import pkgutil
import sys
import threading
from collections.abc import Iterable
from types import ModuleType
from typing import Any

_LOCK = "_deferred_lock"
_BEGUN = "_deferred_begun"


class _Deferred(ModuleType):
    """A module that is executed when an attribute is first looked up which it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        # No two threads wait for each other here, because the files of the package import each other in no circle.
        with own.get(_LOCK) or threading.Lock():
            if _BEGUN in own and not own[_BEGUN]:
                own[_BEGUN] = True
                self._execute()
        return ModuleType.__getattribute__(self, name)

    def _execute(self) -> None:
        own = vars(self)
        spec = self.__spec__
        assert spec is not None and spec.loader is not None  # noqa: PT018, S101 - as found by `defer`
        try:
            spec.loader.exec_module(self)
        except BaseException:
            own[_BEGUN] = False
            raise
        object.__setattr__(self, "__class__", ModuleType)
        del own[_BEGUN], own[_LOCK]

    def __dir__(self) -> Iterable[str]:
        getattr(self, "__all__", None)
        return sorted(vars(self))


def defer(package: str, path: Iterable[str]) -> None:
    """Let the modules of a package, which it has not imported yet, be executed on first use.

    ``from .package import module`` then does not execute the module, ``from .package.module import name`` does.
    """
    for found in pkgutil.iter_modules(path, f"{package}."):
        spec = importlib.util.find_spec(found.name)
        assert spec is not None  # noqa: S101 - it was listed by the same finder
        module = sys.modules[found.name] = importlib.util.module_from_spec(spec)
        vars(module).update({_LOCK: threading.RLock(), _BEGUN: False})
        object.__setattr__(module, "__class__", _Deferred)
        setattr(sys.modules[package], found.name.rpartition(".")[2], module)


def load(*modules: ModuleType) -> None:
    """Execute modules that would be executed on their first use."""
    for module in modules:
        dir(module)
