"""The rules of docs/architecture.md about who may import whom."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmemd

ROOT = Path(gmemd.__file__).parent

# Bottom to top: a folder, or a module that lies beside them, imports from itself and from what is below it.
LAYERS = ("errors", "posix", "client", "vmm", "qapi", "keeper", "qmp", "schema", "processes", "authority", "kernel",
          "snapshots", "observe", "persist", "memory", "backends", "objects", "lab", "changes", "commands", "server",
          "web", "daemon", "testing", "demo", "kubernetes", "cli", "emulator", "__main__")

MAY_IMPORT = {
    "asyncio": ("processes.watch", "changes", "client", "commands", "server", "daemon", "web", "cli", "emulator",
                "kubernetes"),
    "socket": ("posix", "client", "vmm", "keeper", "persist", "authority.peer", "server", "daemon", "web", "cli",
               "emulator", "kubernetes"),
    "fcntl": ("posix", "vmm", "keeper", "authority.peer", "kernel", "snapshots", "persist", "demo", "emulator.pidfile",
              "kubernetes"),
    "ctypes": ("vmm", "kernel", "demo"),
    "structlog": ("observe.log",),
    "rich": ("cli.terminal",),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree: ast.Module, *, types: bool = False) -> Iterator[str]:
    """Names of what a module imports at run time, or under TYPE_CHECKING, too."""
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If)
               and "TYPE_CHECKING" in ast.unparse(node.test) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in guarded and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int:
    """The layer of a module of ours."""
    return LAYERS.index(name.partition(".")[0])


ALL = dict(modules())


@pytest.mark.parametrize("name", [name for name in ALL if name != "__init__"])
def test_imports_only_from_below(name: str) -> None:
    """No module imports from a layer above its own."""
    others = [other.removeprefix("gmemd.") for other in imports(ALL[name]) if other.startswith("gmemd.")]
    assert [other for other in others if other != "__version__" and layer(other) > layer(name)] == []


def test_a_layer_is_a_folder() -> None:
    """The list of layers is the list of what lies in gmemd/."""
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(LAYERS)


PAGE = (ROOT.parent / "docs" / "architecture.md").read_text()


def test_the_page_lists_the_layers() -> None:
    """Its table has all of them in their order, and what each uses where it says so."""
    rows = re.findall(r"^\| `([a-z_]+)` \| .* \| ([a-z, ]*)\|$", PAGE.partition("\n## Nouns")[0], re.MULTILINE)
    assert [name for name, _ in rows] == list(LAYERS)
    used = {name: {other.split(".")[1] for module, tree in ALL.items() if module.split(".")[0] == name
                   for other in imports(tree) if other.startswith("gmemd.")} for name in LAYERS}
    told = {name: set(words.strip().split(", ")) - {""} for name, words in rows if "earlier" not in words}
    assert told == {name: used[name] - {name, "errors", "__version__"} for name in told}


def _defined() -> dict[str, set[str]]:
    """The names that each module and each class defines, a class with those of its bases."""
    found: dict[str, set[str]] = {}
    for module, tree in ALL.items():
        found[module] = {node.name for node in tree.body if hasattr(node, "name")}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = {inner.name for inner in node.body if hasattr(inner, "name")} | {
                    inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
                found[node.name].update(*(found.get(ast.unparse(base), set()) for base in node.bases))
    return found


DEFINED = _defined()


def _exists(word: str, path: str) -> bool:
    """Whether there is a file, a method, a function of a module; a function or class in the module at `path`."""
    owner, _, name = word.partition("(")[0].rpartition(".")
    if "/" in word or name == "py":
        return any([*ROOT.glob(word), *ROOT.parent.glob(word)])
    if not owner:
        return name in DEFINED[path.removesuffix(".py").replace("/", ".")]
    return word in ALL or any(name in names for place, names in DEFINED.items() if f".{place}".endswith(f".{owner}"))


def test_what_the_page_names_exists() -> None:
    """Each path, each `Class.method` and `module.function`, and what stands beside a path."""
    text = PAGE.partition("\n## What should not exist")[0]
    named = [(word, "") for word in re.findall(r"`(\w[\w*]*(?:[/.][\w*.]+)+)[`(]", text)]
    named += [(word, path) for path, words in re.findall(r"^\| `(\S+\.py)` ([^|]*)", text, re.MULTILINE)
              for word in re.findall(r"`(\w+)`", words)]
    assert len(named) > 50
    assert [word for word, path in named if not _exists(word, path)] == []


def test_no_circle() -> None:
    """No modules need each other, not even for types."""
    graph: dict[str, set[str]] = {}
    for name, tree in ALL.items():
        seen = [other.removeprefix("gmemd.") for other in imports(tree, types=True)]
        graph[name] = {module for other in seen for module in (other, other.rpartition(".")[0]) if module in ALL}
    while free := {name for name, others in graph.items() if not others & graph.keys() - {name}}:
        graph = {name: others for name, others in graph.items() if name not in free}
    assert graph == {}


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_libraries_stay_where_they_belong(library: str) -> None:
    """asyncio, sockets, system calls and logging are each in few places."""
    users = [name for name, tree in ALL.items() if any(other.split(".")[0] == library for other in imports(tree))]
    allowed = MAY_IMPORT[library]
    assert [name for name in users
            if not any(name == place or name.startswith(place + ".") for place in allowed)] == []


def test_the_keeper_stands_alone() -> None:
    """What it does not import cannot fail in it."""
    others = {other.split(".")[1] for name, tree in ALL.items() if name.startswith("keeper")
              for other in imports(tree) if other.startswith("gmemd.")}
    assert others <= {"keeper", "posix", "errors"}


def test_simulation_is_known_in_one_place() -> None:
    """Nobody but the kernel layer asks whether the kernel is simulated in order to do something else."""
    branching = [name for name, tree in ALL.items() if not name.startswith("kernel")
                 for node in ast.walk(tree) if isinstance(node, ast.If) and "simulated" in ast.unparse(node.test)]
    assert branching == []


def test_a_start_loads_little(tmp_path: Path) -> None:
    """What a daemon that keeps nothing needs only later, if ever, does not delay its greeting."""
    path = tmp_path / "q"
    code = f"""
import os, signal, socket, sys, time
from _thread import start_new_thread
from gmemd.cli.gmemd import main

def look():
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex({str(path)!r}):
            time.sleep(0.001)
        client.recv(1000)
    print(*sys.modules, file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)

start_new_thread(look, ())
main(["--qmp", {f"unix:{path}"!r}, "--persist", "off", "--warm", "off", "--log-level=error",
      "--snapshots", {str(tmp_path / "none")!r}])
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT.parent)})
    loaded = set(done.stderr.split())
    rare = {"sqlite3", "datetime", "jsonschema", "aiohttp", "structlog", "_ssl", "_hashlib", "typing", "argparse",
            "inspect", "dataclasses", "logging", "subprocess", "traceback", "concurrent.futures", "asyncio.streams"}
    assert rare & loaded <= ({"typing"} if "gmemd.kernel.simulated" in loaded else set())
    own = {name.removeprefix("gmemd.") for name in loaded}
    assert {layer: words for layer in ("commands", "backends", "memory", "objects", "persist", "snapshots")
            if (words := sorted(name.partition(".")[2] for name in own if name.startswith(f"{layer}.")))} == {
        "commands": ["budget", "context", "control", "dispatch", "loading", "rooms"],
        "objects": ["container", "fds", "names", "shares"],
        "persist": ["keeping", "liveupdate", "manager", "nobody", "notify", "unit", "waits"]}
