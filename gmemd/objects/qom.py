"""The QOM tree: /objects with the memory and the thread contexts, mounted nodes, and the types.

A node is created when a path names it, and lists itself in QEMU's order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from gmemd.backends.base import BASE_ORDER, HostMemoryBackend
from gmemd.backends.types import BACKENDS
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.objects.container import Objects, ThreadContext
from gmemd.objects.names import at_home
from gmemd.schema.validate import Schema

INTERFACES = frozenset({"user-creatable", "interface"})

_REGION = {"container": "link<memory-region>", "addr": "uint64", "size": "uint64", "priority": "uint32"}
_CONTEXT = {"thread-id": "int", "node-affinity": "int", "cpu-affinity": "int"}
_OBJECTS = r"\x2fobjects\x2f"  # the prefix of a region name that is a whole path


class Type(NamedTuple):
    """A type of nodes; `properties` returns the rows of qom-list-properties, except `type`."""

    parent: str | None
    abstract: bool = False
    properties: Callable[[], list[dict[str, Any]]] = list


class Node:
    """A node in the tree, empty by default."""

    backend: HostMemoryBackend | None = None  # its type
    unreadable = ""  # the property that can only be set
    width = 0  # the approximate number of children, if there may be many

    def __init__(self, path: str, type_name: str) -> None:
        self.path = path
        self.type_name = type_name

    def child(self, name: str) -> Node | None:
        """The child with that name, else None."""
        return None

    def members(self) -> Iterator[tuple[str, str]]:
        """Name and QOM type of each property and child, except `type`."""
        return iter(())

    def listing(self) -> Iterator[dict[str, str]]:
        """The rows of the answer of qom-list."""
        yield {"name": "type", "type": "string"}
        for name, kind in self.members():
            yield {"name": name, "type": kind}

    def get(self, name: str) -> Any:
        """The value of a property; the path of a child."""
        if name == "type":
            return self.type_name
        child = self.child(name)
        if child is None:
            raise QmpError(f"Property '{self.type_name}.{name}' not found")
        return child.path

    def set(self, name: str, value: Any, judged: Callable[[], None]) -> Any:
        """Change a property; the result of qom-set. `judged` is called after all checks, before the change."""
        self.get(name)
        raise QmpError(f"Property '{self.type_name}.{name}' is not writable")


class Fixed(Node):
    """A node with fixed members: a node, or the type and the value of a property."""

    def __init__(self, path: str, type_name: str, given: Mapping[str, Node | tuple[str, Any]]) -> None:
        super().__init__(path, type_name)
        self._given = given

    def child(self, name: str) -> Node | None:
        found = self._given.get(name)
        return found if isinstance(found, Node) else None

    def members(self) -> Iterator[tuple[str, str]]:
        return ((name, f"child<{one.type_name}>" if isinstance(one, Node) else one[0])
                for name, one in self._given.items())

    def get(self, name: str) -> Any:
        found = self._given.get(name)
        return found[1] if isinstance(found, tuple) else super().get(name)


class BackendNode(Node):
    """A memory object, with its memory region."""

    backend: HostMemoryBackend

    def __init__(self, backend: HostMemoryBackend, schema: Schema, name: str = "") -> None:
        """`name`: the one it is listed by, if that is not its id."""
        super().__init__(f"/objects/{name or backend.id}", backend.qom_type)
        self.backend = backend
        self._schema = schema

    @property
    def _region(self) -> str:
        return self.backend.region_name.replace("/", r"\x2f") + "[0]"

    def child(self, name: str) -> Node | None:
        if name != self._region:
            return None
        values = {"container": "", "addr": 0, "size": self.backend.size, "priority": 0}
        return Fixed(f"{self.path}/{name}", "memory-region",
                     {name: (kind, values[name]) for name, kind in _REGION.items()})

    def members(self) -> Iterator[tuple[str, str]]:
        declared = self._schema.properties(self.type_name)
        for name in self.backend.property_names():
            yield name, declared[name].qom_type
        yield self._region, "child<memory-region>"

    def get(self, name: str) -> Any:
        return self.backend.get(name) if name in self.backend.property_names() else super().get(name)


class ContextNode(Node):
    """A thread context."""

    unreadable = "node-affinity"

    def __init__(self, context: ThreadContext, name: str = "") -> None:
        super().__init__(f"/objects/{name or context.id}", context.qom_type)
        self.context = context

    def members(self) -> Iterator[tuple[str, str]]:
        return iter(_CONTEXT.items())

    def get(self, name: str) -> Any:
        match name:
            case "thread-id":
                return os.getpid()  # the main thread starts all others
            case "cpu-affinity":
                return self.context.cpus
            case self.unreadable:
                raise QmpError(f"Property '{self.type_name}.{name}' is not readable")
        return super().get(name)


class _ObjectsNode(Node):
    """/objects."""

    def __init__(self, objects: Objects, schema: Schema) -> None:
        super().__init__("/objects", "container")
        self._objects = objects
        self._schema = schema
        self.others: dict[str, Node] = {}
        self.rooms: dict[str, Objects] = {}

    @property
    def width(self) -> int:  # type: ignore[override]
        return sum(len(objects) + len(objects.contexts) for objects in (self._objects, *self.rooms.values()))

    def child(self, name: str) -> Node | None:
        object_id, tenant = at_home(name) if self.rooms else (name, None)
        objects = self._objects if tenant is None else self.rooms.get(tenant)
        if objects is None:
            return None
        backend = objects.get(object_id)
        if backend is not None:
            return BackendNode(backend, self._schema, name)
        context = objects.contexts.get(object_id)
        return self.others.get(name) if context is None else ContextNode(context, name)

    def members(self) -> Iterator[tuple[str, str]]:
        for one in self._objects.listed():
            yield one.id, f"child<{one.qom_type}>"
        for tenant, objects in self.rooms.items():
            for one in objects.listed():
                yield f"{one.id}@{tenant}", f"child<{one.qom_type}>"
        for name, node in self.others.items():
            yield name, f"child<{node.type_name}>"


class Tree:
    """All nodes and types; others mount nodes, and add to `types` and to `others`, nodes below /objects."""

    def __init__(self, schema: Schema, objects: Objects) -> None:
        below = _ObjectsNode(objects, schema)
        self.others = below.others
        self.rooms = below.rooms  # the objects in rooms, which are listed as well
        self._objects = objects
        self._schema = schema
        self._top: dict[str, Node] = {"objects": below}
        self._starts: list[Node] = [Fixed("", "container", self._top), below]  # the root, then other starts of paths
        self.types: dict[str, Type] = {
            "object": Type(None, abstract=True),
            "container": Type("object"),
            "memory-region": Type("object", properties=lambda: _rows(_REGION)),
            "memory-backend": Type("object", abstract=True, properties=partial(
                self._declared, "memory-backend-ram", BASE_ORDER)),  # which adds none of its own
            "thread-context": Type("object", properties=lambda: _rows(_CONTEXT)),
            **{name: Type("memory-backend", properties=partial(self._declared, name, kind.property_names()))
               for name, kind in BACKENDS.items()},
        }

    def _declared(self, type_name: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
        declared = self._schema.properties(type_name)
        return [{"name": name, "type": declared[name].qom_type}
                | ({} if (text := declared[name].description) is None else {"description": text}) for name in names]

    def mount(self, name: str, node: Node, *starts: Node) -> None:
        """Mount a node next to /objects; a partial path may begin in it, and in `starts`."""
        self._top[name] = node
        self._starts += [node, *starts]

    def over(self, objects: Objects) -> Tree:
        """The same tree over other objects."""
        other = Tree(self._schema, objects)
        other.others.update(self.others)
        other.types = self.types
        other._top |= {name: node for name, node in self._top.items() if name != "objects"}
        other._starts += self._starts[2:]
        return other

    def is_a(self, name: str | None, ancestor: str) -> bool:
        """Whether a type is, inherits from, or implements another."""
        if ancestor == "user-creatable":
            return name in self._schema.object_types
        while name is not None and name != ancestor:
            name = self.types[name].parent
        return name is not None

    def resolve(self, path: str, *, listing: bool = False) -> Node:
        """The node that a path names; one without leading slash may begin anywhere, if only one node matches.

        `listing`: as in qom-list, which distinguishes ambiguous from non-existent paths.
        """
        nodes = self.matches(path)
        if len(nodes) == 1:
            return nodes[0]
        if listing and nodes:
            raise QmpError(f"Path '{path}' is ambiguous")
        raise _not_found(path)

    def find_context(self, path: str) -> str:
        """The full path of the thread context that prealloc-context names."""
        nodes = self.matches(path)
        for node in nodes:
            if node.type_name == ThreadContext.qom_type:
                return node.path
        raise QmpError("Invalid parameter type for 'prealloc-context', expected: thread-context") if nodes \
            else _not_found(path)

    def matches(self, path: str) -> list[Node]:
        """Every node that a path can mean; the empty one means any."""
        parts = [part for part in path.split("/") if part]
        starts = self._starts
        if path.startswith("/"):
            starts = starts[:1]
        elif parts:
            owner = self._objects.get(parts[0].removesuffix("[0]").removeprefix(_OBJECTS))
            if owner is not None:
                starts = [*starts, BackendNode(owner, self._schema)]
        return [node for start in starts if (node := _walk(start, parts)) is not None]


def _walk(start: Node, parts: list[str]) -> Node | None:
    node: Node | None = start
    for part in parts:
        if node is None:
            break
        node = node.child(part)
    return node


def _not_found(path: str) -> QmpError:
    return QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)


def _rows(kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "type": kind} for name, kind in kinds.items()]
