"""The OpenAPI 3.1 document: the table of routes, and the types of the QAPI schema that they name.

OpenAPI 3.1 uses JSON Schema 2020-12 as it is, so the types of qom.json are unchanged but for their location.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from gmemd.schema.validate import Schema
from gmemd.web.routes import Parameter, Route

_DEFS: Final = "#/$defs/"
_PLACE: Final = "#/components/schemas/"
_ERRORS: Final = {
    400: "A parameter or the Host header is not allowed.",
    403: "A cross-site request, or the Host header names another host.",
    405: "Only GET and HEAD are allowed.",
    414: "The query is too long.",
}


def document(schema: Schema, routes: Sequence[Route], version: str) -> dict[str, Any]:
    own = _own_types(schema)
    paths = {route.path: {"get": _operation(route)} for route in routes}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gmemd", "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
                 "description": "The state of the guest memory daemon, read-only: commands go over QMP."},
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "paths": paths,
        "components": {"schemas": _closure({"paths": paths, "own": own}, own, schema.document["$defs"])},
    }


def _operation(route: Route) -> dict[str, Any]:
    content = {route.media: {"schema": dict(route.returns) if route.returns is not None else {"type": "string"}}}
    errors = {**_ERRORS, **route.errors}
    return {
        "operationId": route.answer,
        "summary": route.summary,
        "parameters": [_parameter(parameter) for parameter in route.parameters],
        "responses": {"200": {"description": "As asked.", "content": content},
                      **{str(code): _error(code, text) for code, text in sorted(errors.items())}},
    }


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {"name": parameter.name, "in": "path" if parameter.in_path else "query", "required": parameter.in_path,
            "description": parameter.doc, "schema": dict(parameter.schema)}


def _error(code: int, text: str) -> dict[str, Any]:
    if code == 503:
        return {"description": text, "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"description": text, "content": {"application/json": {"schema": {"$ref": _PLACE + "Error"}}}}


def _own_types(schema: Schema) -> dict[str, Any]:
    """The types that only HTTP has, mostly pages of a list with its total length."""
    status = schema.document["$defs"]["MemdevStatus"]
    more = {"private": _size("Bytes that are private; absent if it is not a guest_memfd."),
            "resident-private": _size("Private bytes that occupy memory now; absent if unknown."),
            "resident-shared": _size("Shared bytes that occupy memory now; absent if unknown."),
            "ranges": _size("How many ranges of one visibility it consists of; absent if it is not a guest_memfd.")}
    memory_object = {**status, "title": "MemoryObject", "description": "MemdevStatus, and more that only HTTP has.",
                     "properties": {**status["properties"], **more}}
    return {
        "Error": _object(error=_object(**{"class": {"type": "string"}, "desc": {"type": "string"}})),
        "MemoryObject": memory_object,
        "ObjectPage": _object(total=_size("How many there are in total."), offset=_size("How many were skipped."),
                              objects={"type": "array", "items": {"$ref": _PLACE + "MemoryObject"}}),
        "RangePage": _object({"next-offset"}, private=_size("Private bytes in total."),
                             simulated={"type": "boolean", "description": "true if the kernel does not know it"},
                             ranges={"type": "array", "items": {"$ref": _DEFS + "MemdevRange"}},
                             **{"next-offset": _size("Where the next page begins; absent in the last.")}),
        "SnapshotPage": _object(total=_size("How many there are in total."), offset=_size("How many were skipped."),
                                snapshots={"type": "array", "items": {"$ref": _DEFS + "MemdevSnapshot"}}),
        "HolderPage": _object(total=_size("How many objects there are."), offset=_size("How many were skipped."),
                              objects={"type": "array", "items": _object(
                                  id={"type": "string"},
                                  holders={"type": "array", "items": {"$ref": _DEFS + "MemdevHolder"}})}),
        "RecentEvent": _object(event={"type": "string", "enum": list(schema.events)}, data={"type": "object"},
                               timestamp=_object(seconds={"type": "integer"}, microseconds={"type": "integer"})),
        "Capabilities": _object(
            capabilities={"type": "array", "items": {"$ref": _DEFS + "QMPCapability"}},
            commands={"type": "array", "items": {"type": "string"}},
            events={"type": "array", "items": {"type": "string"}},
            kernel={"$ref": _DEFS + "KernelKind"}, conversion={"type": "boolean"}, kept={"type": "boolean"},
            **{"object-types": {"type": "array", "items": {"$ref": _DEFS + "ObjectType"}},
               "kernel-reason": {"type": "string"}, "guest-memfd-flags": {"type": ["integer", "null"]},
               "page-size": {"type": "integer"}}),
    }


def _size(text: str) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "description": text}


def _object(optional: set[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in (optional or ())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _closure(root: Any, own: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """All types that `root` refers to, directly or not, at their location in an OpenAPI document."""
    found: dict[str, Any] = {}
    todo = [*own, *_named(root)]
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = _moved(own[name] if name in own else defs[name])
            todo += _named(found[name])
    return {_component(name): found[name] for name in sorted(found)}


def _named(value: Any) -> list[str]:
    return re.findall(r'"#/(?:\$defs|components/schemas)/([^"]+)"', json.dumps(value))


def _moved(value: Any) -> Any:
    """The same with its references adjusted to the location of the types here, and without our annotations."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _PLACE + _component(item.rpartition("/")[2]) if key == "$ref" else _moved(item)
            for key, item in value.items() if not key.startswith("x-")}


def _component(name: str) -> str:
    return name.replace(":", ".")
