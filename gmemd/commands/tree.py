"""The QOM tree: /objects, its memory backends with their memory regions, and its thread contexts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Gmemd
from gmemd.errors import DEVICE_NOT_FOUND, QmpError, os_errors
from gmemd.kernel.affinity import bind, cpus_of
from gmemd.objects.container import ThreadContext

# Of a type: name -> type, value (None: it differs).
REGION: dict[str, tuple[str, Any]] = {"container": ("link<memory-region>", ""), "addr": ("uint64", 0),
                                      "size": ("uint64", None), "priority": ("uint32", 0)}
_OBJECTS = r"\x2fobjects\x2f"  # how the name of a place begins that a whole path has named
CONTEXT = {"thread-id": "int", "node-affinity": "int", "cpu-affinity": "int"}


class Node:
    """A place in the tree: a container, a backend, or a backend's memory region."""

    unreadable = ""  # the property that can only be set

    def __init__(self, gmemd: Gmemd, path: str, backend: HostMemoryBackend | None = None, *,
                 region: bool = False) -> None:
        self.gmemd = gmemd
        self.path = path
        self.backend = backend
        self.region = region

    @property
    def type_name(self) -> str:
        """The QOM type."""
        if self.region:
            return "memory-region"
        return self.backend.qom_type if self.backend else "container"

    def child(self, name: str) -> Node | None:
        """The child of that name, else None."""
        if self.region:
            return None
        if self.backend is not None:
            return Node(self.gmemd, f"{self.path}/{name}", self.backend, region=True) \
                if name == _region_child(self.backend) else None
        if self.path == "":
            return self._top(name)
        backend = self.gmemd.objects.get(name)
        if backend is not None:
            return Node(self.gmemd, f"{self.path}/{name}", backend)
        context = self.gmemd.objects.contexts.get(name)
        if context is not None:
            return ContextNode(self.gmemd, context)
        machine = self.gmemd.machine
        return None if machine is None else machine.object_nodes().get(name)

    def _top(self, name: str) -> Node | None:
        if name == "objects":
            return Node(self.gmemd, "/objects")
        machine = self.gmemd.machine
        return machine.node() if machine is not None and name == "machine" else None

    @property
    def width(self) -> int:
        """About how many rows `listing` gives."""
        objects = self.gmemd.objects
        return len(objects) + len(objects.contexts) if self.path == "/objects" else 0

    def listing(self) -> Iterator[dict[str, str]]:
        """The rows of the answer of qom-list."""
        return ({"name": name, "type": kind} for name, kind in self._listing())

    def _listing(self) -> Iterator[tuple[str, str]]:
        yield "type", "string"
        if self.region:
            yield from ((name, kind) for name, (kind, _) in REGION.items())
        elif self.backend is not None:
            declared = self.gmemd.schema.properties(self.backend.qom_type)
            yield from ((name, declared[name].qom_type) for name in self.backend.property_names())
            yield _region_child(self.backend), "child<memory-region>"
        elif self.path == "":
            yield "objects", "child<container>"
            if self.gmemd.machine:
                yield "machine", f"child<{self.gmemd.machine.node().type_name}>"
        else:
            yield from ((one.id, f"child<{one.qom_type}>") for one in self.gmemd.objects.listed())
            others = self.gmemd.machine.object_nodes() if self.gmemd.machine else {}
            yield from ((name, f"child<{node.type_name}>") for name, node in others.items())

    def get(self, name: str) -> Any:
        """The value of a property; of a child its path."""
        if name == "type":
            return self.type_name
        child = self.child(name)
        if child is not None:
            return child.path
        if self.region and name in REGION:
            return self.backend.size if name == "size" and self.backend else REGION[name][1]
        if self.backend is not None and not self.region and name in self.backend.property_names():
            return self.backend.get(name)
        raise self.no_property(name)

    def set(self, name: str, value: Any) -> Any:
        """Change a property of what is no backend; the result of qom-set."""
        self.get(name)
        raise QmpError(f"Property '{self.type_name}.{name}' is not writable")

    def no_property(self, name: str) -> QmpError:
        """The refusal of a property that is not there."""
        return QmpError(f"Property '{self.type_name}.{name}' not found")


class Fixed(Node):
    """A place with the properties (name -> type, value) and children it is given: what a machine adds."""

    def __init__(self, gmemd: Gmemd, path: str, type_name: str, properties: Mapping[str, tuple[str, Any]],
                 children: Mapping[str, Node] = MappingProxyType({})) -> None:
        super().__init__(gmemd, path)
        self._type_name = type_name
        self._properties = properties
        self._children = children

    @property
    def type_name(self) -> str:
        return self._type_name

    def child(self, name: str) -> Node | None:
        return self._children.get(name)

    def _listing(self) -> Iterator[tuple[str, str]]:
        rows = {"type": "string", **{name: kind for name, (kind, _) in self._properties.items()},
                **{name: f"child<{node.type_name}>" for name, node in self._children.items()}}
        return iter(rows.items())

    def get(self, name: str) -> Any:
        return self._properties[name][1] if name in self._properties else super().get(name)


def _region_child(backend: HostMemoryBackend) -> str:
    """The name of the place of a backend's memory region."""
    return backend.region_name.replace("/", r"\x2f") + "[0]"


class ContextNode(Node):
    """A thread context."""

    unreadable = "node-affinity"

    def __init__(self, gmemd: Gmemd, context: ThreadContext) -> None:
        super().__init__(gmemd, context.path)
        self._context = context

    @property
    def type_name(self) -> str:
        return self._context.qom_type

    def child(self, name: str) -> Node | None:
        return None

    def _listing(self) -> Iterator[tuple[str, str]]:
        yield "type", "string"
        yield from CONTEXT.items()

    def get(self, name: str) -> Any:
        match name:
            case "thread-id":
                return os.getpid()  # the main thread starts all others
            case "cpu-affinity":
                return self._context.cpus
            case self.unreadable:
                raise QmpError(f"Property '{self.type_name}.{name}' is not readable")
        return super().get(name)

    def set(self, name: str, value: Any) -> Any:
        if name not in ("cpu-affinity", "node-affinity"):
            return super().set(name, value)
        chosen = {name: self.gmemd.schema.check_property(self.type_name, name, value)}

        async def change() -> dict[str, Any]:
            self._context.cpus = await usable_cpus(chosen)
            return {}

        check_cpus(chosen)
        return change()


def check_cpus(properties: Mapping[str, Any]) -> None:
    """Judge the lists that a thread context is given."""
    for name, what in (("cpu-affinity", "CPU"), ("node-affinity", "Node")):
        if properties.get(name) == []:
            raise QmpError(f"{what} list is empty")
    if "cpu-affinity" in properties and "node-affinity" in properties:
        raise QmpError("Mixing CPU and node affinity not supported")


async def usable_cpus(properties: Mapping[str, Any]) -> list[int]:
    """The CPUs that a thread gets of those chosen: the kernel judges, in a thread of its own."""
    cpus: set[int] | None = None
    if "node-affinity" in properties:
        cpus = cpus_of(properties["node-affinity"])
        if not cpus:
            raise QmpError("The nodes select no CPUs")
    elif "cpu-affinity" in properties:
        cpus = set(properties["cpu-affinity"])
    with os_errors("Setting CPU affinity failed"):
        found: list[int] = await in_thread(bind, cpus)
    return found


def resolve(gmemd: Gmemd, path: str, *, listing: bool = False) -> Node:
    """The place that a path names; a path without leading slash may begin anywhere, if only one place matches.

    `listing`: as qom-list resolves it, which tells what is ambiguous from what does not exist.
    """
    nodes = matches(gmemd, path)
    if len(nodes) == 1:
        return nodes[0]
    if listing and nodes:
        raise QmpError(f"Path '{path}' is ambiguous")
    raise QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)


def find_context(gmemd: Gmemd, path: str) -> str:
    """The whole path of the thread context that prealloc-context names."""
    nodes = matches(gmemd, path)
    if not nodes:
        raise QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)
    for node in nodes:
        if node.type_name == ThreadContext.qom_type:
            return node.path
    raise QmpError("Invalid parameter type for 'prealloc-context', expected: thread-context")


def matches(gmemd: Gmemd, path: str) -> list[Node]:
    """Every place that a path can mean; the empty one means any."""
    parts = [part for part in path.split("/") if part]
    starts = [Node(gmemd, "")]
    if not path.startswith("/"):
        starts.append(Node(gmemd, "/objects"))
        owner = gmemd.objects.get(parts[0].removesuffix("[0]").removeprefix(_OBJECTS)) if parts else None
        if owner is not None:
            starts.append(Node(gmemd, f"/objects/{owner.id}", owner))
        if gmemd.machine is not None:
            machine = gmemd.machine.node()
            starts += [machine, machine.child("peripheral")]
    return [node for start in starts if (node := _walk(start, parts)) is not None]


def _walk(node: Node | None, parts: list[str]) -> Node | None:
    for part in parts:
        if node is None:
            break
        node = node.child(part)
    return node
