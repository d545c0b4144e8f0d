"""How a worker process is started: with a program that is read soon after the daemon's start.

The package on disk may be replaced or removed while the daemon runs, and another version need not be compatible. So the
worker gets the code of its modules on its standard input, before what it is told there, and the libraries for
digests and compression as open files; it needs nothing else but the interpreter and its standard library.
"""

from __future__ import annotations

import marshal
import os
import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, Final, NamedTuple

# The worker's modules, one a line; one that the work does not need is not loaded.
_MODULES: Final = (
    "gmemd",
    "gmemd.errors",
    "gmemd.kernel",
    "gmemd.kernel.uapi",
    "gmemd.kernel.rules",
    "gmemd.kernel.syscalls",
    "gmemd.kernel.residency",
    "gmemd.kernel.backing",
    "gmemd.kernel.worker",
    "gmemd.kernel.copying",
    "gmemd.client",
    "gmemd.client.messages",
    "gmemd.client.client",
    "gmemd.vmm",
    "gmemd.vmm.ending",
    "gmemd.vmm.state",
    "gmemd.vmm.qemu",
    "gmemd.processes",
    "gmemd.processes.identity",
    "gmemd.processes.freeze",
    "gmemd.processes.guard",
    "gmemd.kernel.userfault",
    "gmemd.snapshots",
    "gmemd.snapshots.pages",
    "gmemd.snapshots.manifest",
    "gmemd.snapshots.folder",
    "gmemd.snapshots.tables",
    "gmemd.snapshots.buffers",
    "gmemd.snapshots.crew",
    "gmemd.snapshots.source",
    "gmemd.snapshots.protected",
    "gmemd.snapshots.cold",
    "gmemd.snapshots.stored",
    "gmemd.snapshots.half",
    "gmemd.snapshots.save",
    "gmemd.snapshots.restore",
    "gmemd.snapshots.rewrite",
    "gmemd.snapshots.mapped_ram",
    "gmemd.snapshots.migration",
    "gmemd.snapshots.stream",
    "gmemd.snapshots.sending",
    "gmemd.snapshots.receiving",
)

# verb: the module whose VERBS has it
_VERBS: Final = {
    "hash": "gmemd.kernel.worker",
    "zero": "gmemd.kernel.worker",
    "copy": "gmemd.kernel.copying",
    "guard": "gmemd.processes.guard",
    "save": "gmemd.snapshots.save",
    "restore": "gmemd.snapshots.restore",
    "verify": "gmemd.snapshots.restore",
    "flatten": "gmemd.snapshots.rewrite",
    "cold": "gmemd.snapshots.rewrite",
    "import": "gmemd.snapshots.mapped_ram",
    "receive": "gmemd.snapshots.migration",
    "stream-send": "gmemd.snapshots.sending",
    "stream-head": "gmemd.snapshots.receiving",
    "stream-receive": "gmemd.snapshots.receiving",
    "stream-fail": "gmemd.snapshots.receiving",
    "stream-answer": "gmemd.snapshots.receiving",
    "stream-ask": "gmemd.snapshots.receiving",
}

# What runs first. The {size} bytes that follow are a dict of the modules' marshalled code or text by name;
# {libraries} has the descriptors of open extension modules by name.
_BEGIN = """
import marshal
import sys
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import spec_from_file_location, spec_from_loader

class Sources:
    code, libraries = marshal.loads(sys.stdin.buffer.read({size})), {libraries}

    def find_spec(self, name, path=None, target=None):
        if name in self.code:
            return spec_from_loader(name, self, is_package=True)
        if name in self.libraries:
            path = f"/proc/self/fd/{{self.libraries[name]}}"
            return spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(marshal.loads(self.code[module.__name__]), module.__dict__)

sys.meta_path.insert(0, Sources())
verb = import_module({verbs}[sys.argv[1]]).VERBS[sys.argv[1]]
sys.exit(import_module("gmemd.kernel.worker").main(verb, sys.argv[2]))
"""


class Program(NamedTuple):
    """A command line, what its standard input begins with, and further descriptors that it needs."""

    command: tuple[str, ...]
    text: bytes
    fds: tuple[int, ...]


@cache
def worker_program() -> Program:
    """The worker's program, without its arguments; read by the first call and kept from then on."""
    code = {name: marshal.dumps(_code(name)) for name in _MODULES}  # each by itself: nobody waits for all of them
    paths = {"_xxhash": _library("xxhash", "_xxhash")}
    code["xxhash"] = marshal.dumps("from _xxhash import *")
    if sys.version_info < (3, 14) and _spec("backports") and _spec("backports.zstd"):
        paths["_zstd"] = _library("backports.zstd", "_zstd")
        code |= {"backports": marshal.dumps(""), "backports.zstd": marshal.dumps("from _zstd import *")}
    libraries = {name: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for name, path in paths.items()}
    modules = marshal.dumps(code)
    text = _BEGIN.format(libraries=libraries, size=len(modules), verbs=_VERBS).encode()
    # Not the environment's interpreter, which may be removed with it; no site-packages, and nothing from the directory.
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    begin = f"import sys; exec(sys.stdin.buffer.read({len(text)}))"
    return Program((interpreter, "-sSP", "-c", begin), text + modules, tuple(libraries.values()))


def is_own(pid: int) -> bool:
    """Whether a process is one of this process's workers, or about to become one."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as stat:
            parent = int(stat.read().rpartition(")")[2].split()[1])
        with open(f"/proc/{pid}/cmdline", "rb") as words, open("/proc/self/cmdline", "rb") as own:
            told = words.read()
            begins = "\0".join(worker_program().command).encode()
            return parent == os.getpid() and (not told or told.startswith(begins) or told == own.read())
    except OSError:
        return False


def _code(name: str) -> Any:
    """A module's code: compiled if it lies so on the disk, else its text, and the worker compiles what it needs."""
    spec: Any = _spec(name)
    if spec.cached and os.path.exists(spec.cached) and hasattr(spec.loader, "get_code"):
        return spec.loader.get_code(name)
    return spec.loader.get_data(spec.origin).decode()


def _spec(name: str) -> ModuleSpec | None:
    """Where the import system finds a module now, whether it is loaded or not: server/ahead.py may say where."""
    parent = name.rpartition(".")[0]
    path = import_module(parent).__path__ if parent else None
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path, None)
        if spec is not None:
            return spec
    return None


def _library(name: str, extension: str) -> str:
    """The path of a package's extension module."""
    package = _spec(name)
    found = PathFinder.find_spec(extension, package.submodule_search_locations if package else None)
    if found is None or found.origin is None:
        raise ImportError(f"{name} has no extension module")
    return found.origin
