"""How a worker process is started: with a program that is read when the daemon starts.

The package on disk may be replaced or removed while the daemon runs, and another version need not be compatible. So the
worker gets the sources of its modules on its standard input, before what it is told there, and the libraries for
digests and compression as open files; it needs nothing else but the interpreter and its standard library.
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
            "gmemd.kernel.residency", "gmemd.kernel.backing", "gmemd.kernel.worker", "gmemd.snapshots",
            *("gmemd.snapshots." + name for name in (
                "pages", "manifest", "folder", "tables", "buffers", "crew", "source", "cold", "stored", "half", "save",
                "restore", "rewrite", "migration")))

# What runs first: {sources} is a dict of them by name, {libraries} of (extension module, number of its open file).
_BEGIN = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

def load(name, extension, fd):
    path = f"/proc/self/fd/{{fd}}"
    spec = spec_from_file_location(extension, path, loader=ExtensionFileLoader(extension, path))
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)

for name, (extension, fd) in {libraries}.items():
    package = name.rpartition(".")[0]
    if package:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = []
    load(name, extension, fd)
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
    paths = {"xxhash": _library("xxhash", "_xxhash")}
    if sys.version_info < (3, 14) and find_spec("backports") and find_spec("backports.zstd"):
        paths["backports.zstd"] = _library("backports.zstd", "_zstd")
    libraries = {name: (extension, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                 for name, (extension, path) in paths.items()}
    sources = {name: _source(name) for name in _MODULES}
    text = _BEGIN.format(libraries=libraries, sources=sources).encode()
    # Not the environment's interpreter, which may be removed with it; no site-packages, and nothing from the directory.
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    begin = f"import sys; exec(sys.stdin.buffer.read({len(text)}))"
    return Program((interpreter, "-sSP", "-c", begin), text, tuple([fd for _, fd in libraries.values()]))


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


def _library(name: str, extension: str) -> tuple[str, str]:
    """A package's extension module, and its path."""
    package = find_spec(name)
    found = PathFinder.find_spec(extension, package.submodule_search_locations if package else None)
    if found is None or found.origin is None:
        raise ImportError(f"{name} has no extension module")
    return extension, found.origin
