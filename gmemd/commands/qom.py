"""Commands on the QOM tree: /objects, its memory backends and their memory regions (qmp.md section 11)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from gmemd.backends.base import BASE_ORDER, HostMemoryBackend
from gmemd.changes.claims import claimed
from gmemd.changes.pace import Pace
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd, recorded
from gmemd.commands.listing import SHORT, in_turns, listed
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.objects import BACKENDS

# Every QOM type there is: name -> parent (None for the root type), and those that cannot be instantiated.
TYPES: dict[str, str | None] = {
    "object": None,
    "container": "object",
    "memory-region": "object",
    "memory-backend": "object",
    **dict.fromkeys(BACKENDS, "memory-backend"),
}
ABSTRACT = frozenset({"object", "memory-backend"})
INTERFACES = frozenset({"user-creatable", "interface"})

_REGION = {"container": ("link<memory-region>", ""), "addr": ("uint64", 0), "size": ("uint64", None),
           "priority": ("uint32", 0)}

_FEW = 5  # paths of qom-list-get that are answered at once


class Node:
    """A place in the tree: a container, a backend, or a backend's memory region."""

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
                if name == f"{self.backend.id}[0]" else None
        if self.path == "":
            return self._top(name)
        backend = self.gmemd.objects.get(name)
        if backend is not None:
            return Node(self.gmemd, f"{self.path}/{name}", backend)
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
        return len(self.gmemd.objects) if self.path == "/objects" else 0

    def listing(self) -> Iterator[dict[str, str]]:
        """The rows of the answer of qom-list."""
        return ({"name": name, "type": kind} for name, kind in self._listing())

    def _listing(self) -> Iterator[tuple[str, str]]:
        yield "type", "string"
        if self.region:
            yield from ((name, kind) for name, (kind, _) in _REGION.items())
        elif self.backend is not None:
            declared = self.gmemd.schema.properties(self.backend.qom_type)
            yield from ((name, declared[name].qom_type) for name in self.backend.property_names())
            yield f"{self.backend.id}[0]", "child<memory-region>"
        elif self.path == "":
            yield "objects", "child<container>"
            if self.gmemd.machine:
                yield "machine", f"child<{self.gmemd.machine.node().type_name}>"
        else:
            yield from ((backend.id, f"child<{backend.qom_type}>") for backend in self.gmemd.objects)
            others = self.gmemd.machine.object_nodes() if self.gmemd.machine else {}
            yield from ((name, f"child<{node.type_name}>") for name, node in others.items())

    def get(self, name: str) -> Any:
        """The value of a property; of a child its path."""
        if name == "type":
            return self.type_name
        child = self.child(name)
        if child is not None:
            return child.path
        if self.region and name in _REGION:
            return self.backend.size if name == "size" and self.backend else _REGION[name][1]
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


def resolve(gmemd: Gmemd, path: str, *, listing: bool = False) -> Node:
    """The place that a path names; a path without leading slash may begin anywhere, if only one place matches.

    `listing`: as qom-list resolves it, which tells what is ambiguous from what does not exist.
    """
    nodes = _matches(gmemd, path)
    if len(nodes) == 1:
        return nodes[0]
    if listing and nodes:
        raise QmpError(f"Path '{path}' is ambiguous")
    raise QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)


def find_context(gmemd: Gmemd, path: str) -> None:
    """Judge what prealloc-context names; without a machine there is no such type as thread-context."""
    nodes = _matches(gmemd, path)
    if not nodes:
        raise QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)
    if not any(node.type_name == "thread-context" for node in nodes):
        raise QmpError("Invalid parameter type for 'prealloc-context', expected: thread-context")


def _matches(gmemd: Gmemd, path: str) -> list[Node]:
    """Every place that a path can mean; the empty one means any."""
    parts = [part for part in path.split("/") if part]
    starts = [Node(gmemd, "")]
    if not path.startswith("/"):
        starts.append(Node(gmemd, "/objects"))
        owner = gmemd.objects.get(parts[0].removesuffix("[0]")) if parts else None
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


def qom_list(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    node = resolve(gmemd, arguments["path"], listing=True)
    return listed(node.listing(), node.width)


def qom_list_get(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    paths = arguments["paths"]
    if len(paths) <= _FEW:
        nodes = [resolve(gmemd, path, listing=True) for path in paths]
        if sum([node.width for node in nodes]) <= SHORT:
            return [{"properties": list(_values(node))} for node in nodes]
    return _get_in_turns(gmemd, paths)


async def _get_in_turns(gmemd: Gmemd, paths: list[str]) -> bytes:
    pace = Pace()
    return await in_turns([await in_turns(_values(resolve(gmemd, path, listing=True)), pace, properties=...)
                           for path in paths], pace)


def _values(node: Node) -> Iterator[dict[str, Any]]:
    return ({**row, "value": node.get(row["name"])} for row in node.listing())


def qom_get(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    return resolve(gmemd, arguments["path"]).get(arguments["property"])


def qom_set(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    node, name, value = resolve(gmemd, arguments["path"]), arguments["property"], arguments["value"]
    backend = node.backend
    if backend is None or node.region or name not in backend.property_names():
        return node.set(name, value)
    backend.check_idle()
    value = judge_value(gmemd, backend, name, value)
    if name == "prealloc" and value and not backend.properties["prealloc"]:
        return claimed(gmemd, backend, "it is being populated", lambda: _preallocate(gmemd, backend))
    return set_property(gmemd, backend, name, value)


def judge_value(gmemd: Gmemd, backend: HostMemoryBackend, name: str, value: Any) -> Any:
    """The value that a property of a live object may be set to; QmpError if it may not."""
    backend.refuse_set(name, seen=False)
    value = gmemd.schema.check_property(backend.qom_type, name, value)
    if name == "prealloc-context" and value:
        find_context(gmemd, value)
    backend.refuse_set(name, seen=True)
    backend.check_value(name, value)
    return value


async def _preallocate(gmemd: Gmemd, backend: HostMemoryBackend) -> Any:
    await in_thread(backend.populate, gmemd.kernel)
    return set_property(gmemd, backend, "prealloc", True)


def set_property(gmemd: Gmemd, backend: HostMemoryBackend, name: str, value: Any) -> Any:
    """Store a judged value, also in the record; the result of the command that does so."""
    before = backend.properties.get(name)
    backend.set(name, value)
    return recorded(gmemd, backend, {}, undo=lambda: backend.reset(name, before))


def qom_list_types(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    implements, abstract = arguments.get("implements"), arguments.get("abstract", False)
    rows = []
    types, no_instances = _types(gmemd)
    for name, parent in types.items():
        if name in no_instances and not abstract:
            continue
        if implements is not None and not _is_a(gmemd, name, implements):
            continue
        row: dict[str, Any] = {"name": name}
        if name in no_instances:
            row["abstract"] = True
        if parent is not None:
            row["parent"] = parent
        rows.append(row)
    return rows


def _types(gmemd: Gmemd) -> tuple[dict[str, str | None], frozenset[str]]:
    """All types with their parents, and those that cannot be instantiated."""
    if gmemd.machine is None:
        return TYPES, ABSTRACT
    return TYPES | dict(gmemd.machine.types), ABSTRACT | gmemd.machine.abstract


def _is_a(gmemd: Gmemd, name: str | None, ancestor: str) -> bool:
    if ancestor == "user-creatable":
        return name in gmemd.schema.object_types
    types, _ = _types(gmemd)
    while name is not None:
        if name == ancestor:
            return True
        name = types[name]
    return False


def qom_list_properties(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    type_name = arguments["typename"]
    if type_name in INTERFACES:
        raise QmpError("Parameter 'typename' expects a QOM type")
    if type_name not in _types(gmemd)[0]:
        raise QmpError(f"Class '{type_name}' not found", DEVICE_NOT_FOUND)
    return [{"name": "type", "type": "string"}, *_declared(gmemd, type_name)]


def _declared(gmemd: Gmemd, type_name: str) -> list[dict[str, str]]:
    """What qom-list-properties tells of a type, but for its type."""
    if type_name == "memory-region":
        return [{"name": name, "type": kind} for name, (kind, _) in _REGION.items()]
    backend = BACKENDS.get(type_name)
    if backend is None and type_name != "memory-backend":
        machine = gmemd.machine
        return machine.properties(type_name) if machine is not None and type_name in machine.types else []
    declared = gmemd.schema.properties(type_name if backend else "memory-backend-ram")  # which adds none of its own
    return [{"name": name, "type": declared[name].qom_type}
            | ({} if (text := declared[name].description) is None else {"description": text})
            for name in (backend.property_names() if backend else BASE_ORDER)]


def device_list_properties(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    if arguments["typename"] in INTERFACES or arguments["typename"] in TYPES:
        raise QmpError("Parameter 'typename' expects a non-abstract device type")
    raise QmpError(f"Device '{arguments['typename']}' not found", DEVICE_NOT_FOUND)
