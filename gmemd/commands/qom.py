"""Commands that read the QOM tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gmemd.backends.base import BASE_ORDER
from gmemd.changes.pace import Pace
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import SHORT, in_turns, listed
from gmemd.commands.tree import CONTEXT, REGION, Node, resolve
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.objects.container import BACKENDS

# Every QOM type there is: name -> parent (None for the root type), and those that cannot be instantiated.
TYPES: dict[str, str | None] = {
    "object": None,
    "container": "object",
    "memory-region": "object",
    "memory-backend": "object",
    "thread-context": "object",
    **dict.fromkeys(BACKENDS, "memory-backend"),
}
ABSTRACT = frozenset({"object", "memory-backend"})
INTERFACES = frozenset({"user-creatable", "interface"})

_FEW = 5  # paths of qom-list-get that are answered at once


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
    return (row if row["name"] == node.unreadable else {**row, "value": node.get(row["name"])}
            for row in node.listing())


def qom_get(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    return resolve(gmemd, arguments["path"]).get(arguments["property"])


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
        return [{"name": name, "type": kind} for name, (kind, _) in REGION.items()]
    if type_name == "thread-context":
        return [{"name": name, "type": kind} for name, kind in CONTEXT.items()]
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
