"""The rules of docs/architecture.md about who may import whom."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmemd

ROOT = Path(gmemd.__file__).parent

# Bottom to top; a module may import from its own layer's packages and from everything below.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "lines", "sockets", "streams", "ahead", "loop", "boottime", "metrics", "ghashtable", "ranges",
     "holders", "jobs", "lease", "survival", "audit"),
    ("qmp.lexer", "qmp.parser", "qmp.strings", "qmp.stream", "qmp.encode", "schema", "kernel"),
    ("qmp.session", "backends", "persist", "fds"),
    ("objects", "lab", "accounting", "changes"),
    ("commands",),
    ("qmp.messages", "qmp.client"),
    ("qmp.monitor", "qmp.inbox", "qmp.outbox", "qmp.room", "qmp.listener", "web"),
    ("daemon", "testing"),
    ("cli", "emulator", "__main__", "demo"),
)

MAY_IMPORT = {
    "asyncio": ("loop", "changes", "qmp.monitor", "qmp.inbox", "qmp.outbox", "qmp.room", "qmp.listener", "qmp.client",
                "commands", "daemon", "web", "cli", "emulator"),
    "socket": ("sockets", "qmp.monitor", "qmp.inbox", "qmp.outbox", "qmp.listener", "qmp.client", "persist", "daemon",
               "web", "cli", "emulator", "testing", "demo"),
    "fcntl": ("sockets", "kernel", "persist", "demo", "emulator.pidfile"),
    "ctypes": ("kernel", "persist", "demo"),
    "structlog": ("log",),
    "rich": ("cli.terminal",),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Names of what a module imports at run time (not under TYPE_CHECKING); own modules without the "gmemd."."""
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If)
               and "TYPE_CHECKING" in ast.unparse(node.test) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[:-node.level] if node.level else []
            base = ".".join(parent + ([node.module] if node.module else []))
            prefix = "gmemd." if node.level else ""
            yield from (f"{prefix}{base}.{alias.name}" for alias in node.names)


def layer(name: str) -> int | None:
    """The layer of a module of ours, or of something in one; None when it is not in the picture."""
    for number, members in enumerate(LAYERS):
        if any(name == member or name.startswith(member + ".") for member in members):
            return number
    return None


ALL = dict(modules())


@pytest.mark.parametrize("name", [name for name in ALL if layer(name) is not None])
def test_imports_only_from_below(name: str) -> None:
    """No module imports from a layer above its own."""
    own = layer(name)
    assert own is not None
    above = [other for other in imports(ALL[name], name) if other.startswith("gmemd.")
             and (layer(other.removeprefix("gmemd.")) or 0) > own]
    assert above == []


def test_every_module_has_a_layer() -> None:
    """A new module takes its place in the picture."""
    packages = {name.rpartition(".")[0] for name in ALL}
    assert [name for name in ALL if layer(name) is None and name not in packages | {"__init__", "log"}] == []


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_libraries_stay_where_they_belong(library: str) -> None:
    """asyncio, sockets, system calls and logging are each in few places."""
    users = [name for name, tree in ALL.items() if any(other.split(".")[0] == library for other in imports(tree, name))]
    allowed = MAY_IMPORT[library]
    assert [name for name in users
            if not any(name == place or name.startswith(place + ".") for place in allowed)] == []


def test_simulation_is_known_in_one_place() -> None:
    """Nobody but the kernel layer asks whether the kernel is simulated in order to do something else."""
    branching = [name for name, tree in ALL.items() if not name.startswith("kernel")
                 for node in ast.walk(tree) if isinstance(node, ast.If) and "simulated" in ast.unparse(node.test)]
    assert branching == []


def test_a_start_loads_little() -> None:
    """What a daemon that keeps nothing needs only later, if ever, does not delay its greeting."""
    code = "import sys, gmemd.cli.gmemd, gmemd.loop, gmemd.daemon; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""}).stdout  # coverage loads SQLite
    loaded = set(said.split())
    assert {"sqlite3", "datetime", "jsonschema", "jsonschema_rs", "aiohttp", "structlog", "_ssl"} & loaded == set()
