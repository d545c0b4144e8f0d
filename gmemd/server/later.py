"""The standard library's asyncio without what the daemon rarely needs: that is imported when something of it is used.

asyncio imports all its modules, and with them ssl, inspect, logging, subprocess, traceback and more: 40 ms and 7 MiB,
most of it for debugging, for errors and for what only HTTP or a child process uses. Here stand-ins take the place of
those while `asyncio` is imported, and asyncio itself has only the names of `_PLACES`, each imported with its module;
any other name makes it whole, as `import asyncio` does.
"""

from __future__ import annotations

import importlib
import importlib._bootstrap as bootstrap
import sys
from collections import namedtuple
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TYPE_CHECKING = False  # typing, too, takes long
if TYPE_CHECKING:
    from typing import Any

CO_COROUTINE = 0x80  # inspect.CO_COROUTINE

# The modules of asyncio that define what a daemon uses from the start.
_PLACES = {
    "AbstractEventLoop": "events", "Handle": "events", "TimerHandle": "events", "get_running_loop": "events",
    "Future": "futures", "Task": "tasks", "create_task": "tasks", "ensure_future": "tasks", "gather": "tasks",
    "shield": "tasks", "sleep": "tasks", "wait": "tasks", "FIRST_COMPLETED": "tasks", "CancelledError": "exceptions",
    "Event": "locks", "Lock": "locks", "Semaphore": "locks",
    "Runner": "runners", "SelectorEventLoop": "unix_events",
}


class _Later(ModuleType):
    """Stands for a module until something of it is used, which it then takes from the real one."""

    def __init__(self, name: str, **known: Any) -> None:
        """`known`: what asyncio takes from it at import."""
        super().__init__(name)
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # it is not a package
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:  # this asyncio needs it at import
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class Instead:
    """Inside `with`, imports find these in place of modules that have not been imported; None: there is no such one."""

    def __init__(self, modules: Mapping[str, ModuleType | None]) -> None:
        self._modules = {name: module for name, module in modules.items() if name not in sys.modules}

    def __enter__(self) -> None:
        sys.modules.update(self._modules)  # type: ignore[arg-type]

    def __exit__(self, *exc: object) -> None:
        for name, module in self._modules.items():
            if name in sys.modules and sys.modules[name] is module:
                del sys.modules[name]


class _NamedTuple(type):
    """The type of typing.NamedTuple, which makes its subclasses named tuples."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> type:
        if not bases:
            return super().__new__(cls, name, bases, space)
        fields = space.get("__annotations__", {})
        defaults = [space[field] for field in fields if field in space]
        made: type = namedtuple(name, fields, defaults=defaults)  # type: ignore[misc]
        for key in space.keys() - fields.keys():
            setattr(made, key, space[key])
        return made


def little_typing() -> Instead:
    """Have what is imported inside `with` get along without typing, 6 ms and 0.5 MiB, which only checkers need."""
    class Anything:
        """Stands for what is written in annotations, or is the base of a class without being one."""

        def __class_getitem__(cls, words: object) -> type:
            return cls

    def anything(name: str, *bounds: object) -> type:
        return type(name, (Anything,), {})  # not the same one: dataclasses knows ClassVar

    named = _NamedTuple("NamedTuple", (), {})
    names = ("Any", "ClassVar", "Final", "Literal", "NoReturn", "Protocol", "Self", "TypeAlias", "_GenericAlias")
    return Instead({"typing": _Later(
        "typing", TYPE_CHECKING=False, NamedTuple=named, cast=lambda kind, value: value, TypeVar=anything,
        _NamedTuple=named, NamedTupleMeta=_NamedTuple,  # in compiled modules, instead of NamedTuple
        **{name: anything(name) for name in names})})


class _LaterLogger:
    def __init__(self, name: str) -> None:
        self._name = name

    def addHandler(self, handler: None) -> None:  # noqa: N802
        pass

    def debug(self, *words: Any) -> None:
        """Say what nobody can have asked for as long as the module is not loaded."""
        if "logging" in sys.modules:
            self.__getattr__("debug")(*words)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("logging").getLogger(self._name), name)


def _is_coroutine_function(function: Any) -> bool:
    """inspect's, which asyncio asks whether somebody has mistaken a coroutine for a callback."""
    return bool(getattr(getattr(function, "__code__", None), "co_flags", 0) & CO_COROUTINE)


def _extract_stack(*words: Any) -> Any:
    """traceback's, for asyncio's debug mode."""
    return importlib.import_module("traceback").extract_stack(*words)


class _Asyncio(ModuleType):
    """asyncio, whose names are imported one by one, or all when it is asked for one that is not in `_PLACES`."""

    __spec__: ModuleSpec

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        if name in _PLACES:
            value = getattr(importlib.import_module(f"asyncio.{_PLACES[name]}"), name)
            setattr(self, name, value)
            return value
        if name != "__all__" and PathFinder.find_spec(f"asyncio.{name}", self.__path__) is not None:
            return importlib.import_module(f"asyncio.{name}")
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        self.__class__ = ModuleType  # type: ignore[assignment]  # all its names are there
        return getattr(self, name)


def _stand_ins() -> dict[str, ModuleType | None]:
    """What takes the place of rare modules, by name."""
    return {
        "ssl": None,  # to the import system: there is none
        "inspect": _Later("inspect", iscoroutinefunction=_is_coroutine_function),
        # Its loggers are asked for, and given handlers, at import.
        "logging": _Later("logging", DEBUG=10, getLogger=_LaterLogger, StreamHandler=lambda: None),
        "subprocess": _Later("subprocess", PIPE=-1, STDOUT=-2),
        "traceback": _Later("traceback", extract_stack=_extract_stack),
        "linecache": _Later("linecache"),
        "concurrent.futures": _Later("concurrent.futures", **{
            name: name for name in ("FIRST_COMPLETED", "FIRST_EXCEPTION", "ALL_COMPLETED")}),
        "asyncio.sslproto": _Later("asyncio.sslproto"),
        "asyncio.staggered": _Later("asyncio.staggered"),
    }


def import_asyncio() -> None:
    """Import what a daemon needs of asyncio; nothing happens where it has been imported, or is another one."""
    spec = PathFinder.find_spec("asyncio")
    if "asyncio" in sys.modules or spec is None:
        return
    import concurrent

    instead = _stand_ins()
    vars(concurrent).setdefault("futures", instead["concurrent.futures"])
    package = bootstrap.module_from_spec(spec)
    package.__class__ = _Asyncio
    sys.modules["asyncio"] = package
    with Instead(instead):
        for name in _PLACES:
            getattr(package, name)


def import_dataclasses() -> None:
    """Import dataclasses without inspect, which takes 6 ms and 0.7 MiB."""
    with Instead({"inspect": _stand_ins()["inspect"]}):
        import dataclasses  # noqa: F401


import_asyncio()
import asyncio as asyncio  # noqa: E402
