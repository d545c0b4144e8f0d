"""Commands that read the QOM tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gmemd.changes.pace import Pace
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import SHORT, in_turns, listed
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.objects.qom import INTERFACES, Node, Tree
from gmemd.qmp.encode import encode
from gmemd.qmp.rows import Pieces

_PLAIN = frozenset({bool, int, str})
_FEW = 5  # paths of qom-list-get that are answered at once


def qom_list(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    node = gmemd.tree.resolve(arguments["path"], listing=True)
    return listed(node.listing(), node.width)


def qom_list_get(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    paths = arguments["paths"]
    if len(paths) <= _FEW:
        nodes = [gmemd.tree.resolve(path, listing=True) for path in paths]
        if sum([node.width for node in nodes]) <= SHORT:
            return [{"properties": list(_values(node))} for node in nodes]
    return _get_in_turns(gmemd.tree, paths)


async def _get_in_turns(tree: Tree, paths: list[str]) -> Pieces:
    pace, texts = Pace(), []
    known: dict[tuple[str, str, Any], bytes] = {}
    for path in paths:
        node = tree.resolve(path, listing=True)
        if node.width > SHORT:
            texts.append(b"".join(await in_turns(_values(node), pace, properties=...)))
        else:
            texts.append(b'{"properties": [%b]}' % b", ".join([_row(row, known) for row in _values(node)]))
            await pace.keep()
    return await in_turns(texts, pace)


def _row(row: dict[str, Any], known: dict[tuple[str, str, Any], bytes]) -> bytes:
    """The row as JSON; most properties have the same value in many objects, and `known` are those that were written."""
    value, kind = row.get("value"), row["type"]
    if type(value) not in _PLAIN or kind.startswith("child<"):
        return encode(row)
    key = row["name"], kind, value
    if key not in known:
        known[key] = encode(row)
    return known[key]


def _values(node: Node) -> Iterator[dict[str, Any]]:
    return (row if row["name"] == node.unreadable else {**row, "value": node.get(row["name"])}
            for row in node.listing())


def qom_get(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    return gmemd.tree.resolve(arguments["path"]).get(arguments["property"])


def qom_list_types(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    implements, abstract = arguments.get("implements"), arguments.get("abstract", False)
    return [{"name": name} | ({"abstract": True} if kind.abstract else {})
            | ({"parent": kind.parent} if kind.parent is not None else {})
            for name, kind in gmemd.tree.types.items()
            if (abstract or not kind.abstract) and (implements is None or gmemd.tree.is_a(name, implements))]


def qom_list_properties(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    type_name = arguments["typename"]
    if type_name in INTERFACES:
        raise QmpError("Parameter 'typename' expects a QOM type")
    if type_name not in gmemd.tree.types:
        raise QmpError(f"Class '{type_name}' not found", DEVICE_NOT_FOUND)
    return [{"name": "type", "type": "string"}, *gmemd.tree.types[type_name].properties()]


def device_list_properties(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    if arguments["typename"] in INTERFACES or arguments["typename"] in gmemd.tree.types:
        raise QmpError("Parameter 'typename' expects a non-abstract device type")
    raise QmpError(f"Device '{arguments['typename']}' not found", DEVICE_NOT_FOUND)
