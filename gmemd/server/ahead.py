"""Loading ahead: modules that a running daemon may need are loaded soon after its start, never at first use.

The package on disk may be replaced or removed while the daemon runs, and at a first use everybody would wait for the
imports. They take longer than the whole start, so a thread does them afterwards, from directories that were opened at
start, whatever has their names by then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, TracebackType

import gmemd

_BY_FD = "/proc/self/fd/"
# Seconds after which the thread yields to the event loop. It has the loop's priority: one of lower priority that holds
# the interpreter's lock would not even run to yield it (findings/python-low-priority-thread-stalls-others.sh).
_SWITCH_SECONDS = 10e-6


class HeldDirectories:
    """The module search path as it was when this was created: inside `with`, all imports are from there.

    Afterwards the directories are closed, and modules appear to be from where those were.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._found: list[str] = []  # modules
        for path in dict.fromkeys([*sys.path, os.path.dirname(os.path.dirname(gmemd.__file__))]):
            try:
                self._held[path] = os.open(path or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:  # an archive, or nothing
                continue

    def __enter__(self) -> None:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, _SWITCH_SECONDS))
        sys.meta_path.insert(0, self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        sys.meta_path.remove(self)
        sys.setswitchinterval(self._interval)
        for name in dict.fromkeys(self._found):  # not all modules, which would take 3 ms
            if name in sys.modules:
                self._move_back(sys.modules[name])
        for place in [place for place in list(sys.path_importer_cache) if place.startswith(_BY_FD)]:
            del sys.path_importer_cache[place]  # directory listings
        while self._held:
            os.close(self._held.popitem()[1])

    def _move_back(self, module: ModuleType) -> None:
        """Make a module appear to be from where its directory was, by name."""
        spec = getattr(module, "__spec__", None)
        for owner, name in ((module, "__file__"), (module, "__cached__"), (spec, "origin"), (spec, "cached"),
                            (getattr(spec, "loader", None), "path")):
            place = getattr(owner, name, None)
            if isinstance(place, str) and place.startswith(_BY_FD):
                setattr(owner, name, self._by_name(place))
        for places in (getattr(module, "__path__", None), getattr(spec, "submodule_search_locations", None)):
            if isinstance(places, list):
                places[:] = map(self._by_name, places)

    def _by_name(self, place: str) -> str:
        """The same location by its directory's name."""
        for path, fd in self._held.items():
            if place == f"{_BY_FD}{fd}" or place.startswith(f"{_BY_FD}{fd}/"):
                return (path or os.curdir) + place[len(f"{_BY_FD}{fd}"):]
        return place

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module as usual, but in the opened directories."""
        self._found.append(name)
        return PathFinder.find_spec(name, [self._place(entry) for entry in (sys.path if path is None else path)])

    def _place(self, path: str) -> str:
        """The same location by the descriptor."""
        for held, fd in self._held.items():
            if path == held or (held and path.startswith(f"{held}/")):
                return f"{_BY_FD}{fd}{path[len(held):]}"
        return path
