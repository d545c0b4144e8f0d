"""How a worker process is started: with a program that is read when the daemon starts.

The package on disk may be replaced or removed while the daemon runs, and another version need not be compatible. So the
worker gets the sources of its modules on its standard input, before what it is told there, and the digest library as an
open file; it needs nothing else but the interpreter and its standard library.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, NamedTuple

# The worker's modules; none imports a later one.
_MODULES = ("gmemd", "gmemd.errors", "gmemd.kernel", "gmemd.kernel.uapi", "gmemd.kernel.rules", "gmemd.kernel.syscalls",
            "gmemd.kernel.residency", "gmemd.kernel.backing", "gmemd.kernel.worker")

# What runs first: {sources} is a dict of them by name, {library} the number of the open file.
_BEGIN = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

def digests():
    path = "/proc/self/fd/{library}"
    spec = spec_from_file_location("_xxhash", path, loader=ExtensionFileLoader("_xxhash", path))
    sys.modules["xxhash"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)

digests()
verbs = {{}}
for name, source in {sources}.items():
    module = sys.modules[name] = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    module.__path__ = []
    exec(compile(source, name, "exec"), module.__dict__)
    verbs |= module.__dict__.get("VERBS", {{}})
sys.exit(sys.modules["gmemd.kernel.worker"].main(verbs, sys.argv[1:]))
"""


class Program(NamedTuple):
    """A command line, what its standard input begins with, and further descriptors that it needs."""

    command: tuple[str, ...]
    text: bytes
    fds: tuple[int, ...]


@cache
def worker_program() -> Program:
    """The worker's program, without its arguments; read by the first call and kept from then on."""
    library = os.open(_library(), os.O_RDONLY | os.O_CLOEXEC)
    sources = {name: _source(name) for name in _MODULES}
    text = _BEGIN.format(library=library, sources=sources).encode()
    # Not the environment's interpreter, which may be removed with it; no site-packages, and nothing from the directory.
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    begin = f"import sys; exec(sys.stdin.buffer.read({len(text)}))"
    return Program((interpreter, "-sSP", "-c", begin), text, (library,))


def is_own(pid: int) -> bool:
    """Whether a process is one of this process's workers, or about to become one."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as stat:
            parent = int(stat.read().rpartition(")")[2].split()[1])
        with open(f"/proc/{pid}/cmdline", "rb") as words, open("/proc/self/cmdline", "rb") as own:
            told = words.read()
            begins = "\0".join(worker_program().command).encode()
            return parent == os.getpid() and (told.startswith(begins) or told == own.read())
    except OSError:
        return False


def _source(name: str) -> str:
    spec: Any = find_spec(name)
    source: bytes = spec.loader.get_data(spec.origin)
    return source.decode()


def _library() -> str:
    """The path of xxhash's extension module."""
    package = find_spec("xxhash")
    found = PathFinder.find_spec("_xxhash", package.submodule_search_locations if package else None)
    if found is None or found.origin is None:
        raise ImportError("xxhash has no extension module")
    return found.origin
