"""Entities → one JSON Schema 2020-12 document; gmemd's own is checked in as gmemd/schema/qom.json.

The document itself describes a QMP command message; `$defs` has every type by name, the arguments of a command
without a named type for them by the command's name, and each branch of a union, flattened, as `UNION:CASE`.
Annotations beyond JSON Schema: `x-qapi` the QAPI type of a scalar or array, `x-tag` the discriminator of a
union, `x-features`, `x-qom` what qom-list-properties shows, `x-accepts-bool`; at the top level `x-commands`, `x-events`
and `x-introspection`, the answer of query-qmp-schema.
"""

from __future__ import annotations

from typing import Any, Final

from gmemd.qapi.entities import (
    BUILTINS,
    EMPTY,
    MISSING,
    Alternate,
    Array,
    Branch,
    Builtin,
    Command,
    Entities,
    Enum,
    Event,
    Feature,
    Member,
    Object,
)
from gmemd.qapi.introspect import introspect

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
NO_MEMBERS: Final = "Nothing"

_INTEGERS: Final = {
    # As on the wire: QEMU accepts -2^63 .. 2^64-1 for 64 bits unsigned, and wraps negative values.
    **dict.fromkeys(("size", "uint64"), (-(1 << 63), (1 << 64) - 1)),
    **{f"uint{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32)},
    **{f"int{bits}": (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (8, 16, 32, 64)},
    "int": (-(1 << 63), (1 << 63) - 1),
}


def json_schema(entities: Entities, *, title: str = "QMP command") -> dict[str, Any]:
    """The document; it is plain JSON data."""
    return _Writer(entities).document(title)


def default_value(entities: Entities, reference: str, written: Any) -> Any:
    """The JSON value of a default as written in the QAPI language, where numbers are strings."""
    if reference in BUILTINS and BUILTINS[reference] == "int" and isinstance(written, str):
        return int(written, 0)
    if reference.startswith("[") and isinstance(written, list):
        return [default_value(entities, reference[1:-1], item) for item in written]
    return written


class _Writer:
    def __init__(self, entities: Entities) -> None:
        self._entities = entities
        self._defs: dict[str, Any] = {NO_MEMBERS: _object_schema({}, [])}

    def document(self, title: str) -> dict[str, Any]:
        commands = {name: self._command(command) for name, command in self._entities.commands.items()}
        events = {name: self._event(event) for name, event in self._entities.events.items()}
        rules = [self._command_rule(name, command["arguments"]) for name, command in commands.items()
                 if command["arguments"] != NO_MEMBERS]
        return {
            "$schema": DIALECT,
            "title": title,
            "type": "object",
            "properties": {"execute": {"enum": list(commands)}, "arguments": {"type": "object"},
                           "id": {"description": "Returned with the answer."}},
            "required": ["execute"],
            "additionalProperties": False,
            "allOf": rules,
            "$defs": self._defs,
            "x-commands": commands,
            "x-events": events,
            "x-introspection": introspect(self._entities),
        }

    def _command_rule(self, name: str, arguments: str) -> dict[str, Any]:
        then: dict[str, Any] = {"properties": {"arguments": {"$ref": f"#/$defs/{arguments}"}}}
        if self._defs[arguments].get("required"):
            then["required"] = ["arguments"]
        return {"if": {"properties": {"execute": {"const": name}}}, "then": then}

    def _command(self, command: Command) -> dict[str, Any]:
        entry: dict[str, Any] = {"doc": command.summary, "arguments": self._arguments(command)}
        if command.returns is not None:
            entry["returns"] = self._reference(command.returns)
        if command.allow_oob:
            entry["allow-oob"] = True
        if command.reads_only:
            entry["reads-only"] = True
        if command.role is not None:
            entry["role"] = command.role
        return entry | _features(command.features)

    def _event(self, event: Event) -> dict[str, Any]:
        return {"doc": event.summary, "data": self._arguments(event)} | _features(event.features)

    def _arguments(self, owner: Command | Event) -> str:
        """The name in $defs of what the arguments or data must be."""
        kind = self._entities.types[owner.arg or EMPTY]
        if not isinstance(kind, Object) or (not kind.tag and not self._entities.members(kind)):
            return NO_MEMBERS
        if kind.implicit:
            self._defs[owner.name] = self._flat(kind, None, owner.name)
            if isinstance(owner, Command) and not owner.gen:  # accepts more than is declared
                self._defs[owner.name]["additionalProperties"] = True
            return owner.name
        self._define(kind)
        return kind.name

    # -- types

    def _reference(self, reference: str) -> dict[str, Any]:
        """The schema of a reference; types with a name go to $defs."""
        kind = self._entities.type(reference)
        if isinstance(kind, Builtin):
            return _builtin(kind.name)
        if isinstance(kind, Array):
            return {"type": "array", "items": self._reference(kind.element), "x-qapi": reference}
        self._define(kind)
        return {"$ref": f"#/$defs/{kind.name}"}

    def _define(self, kind: Enum | Object | Alternate) -> None:
        if kind.name in self._defs:
            return
        self._defs[kind.name] = {}  # a placeholder: types may be recursive
        if isinstance(kind, Enum):
            schema = _enum(kind)
        elif isinstance(kind, Alternate):
            schema = {"anyOf": [self._reference(b.type) for b in kind.branches], "x-qapi": kind.name}
        elif kind.tag is not None:
            schema = self._union(kind)
        else:
            schema = self._flat(kind, None, kind.name)
        self._defs[kind.name] = _doc(kind.summary) | schema

    def _union(self, kind: Object) -> dict[str, Any]:
        assert kind.tag is not None
        rules = []
        for branch in self._entities.branches(kind):
            name = f"{kind.name}:{branch.name}"
            self._defs[name] = self._flat(kind, branch, branch.name)
            chosen = {"properties": {kind.tag: {"const": branch.name}}, "required": [kind.tag]}
            rules.append({"if": chosen, "then": {"$ref": f"#/$defs/{name}"}})
        tag = next(member for member in self._entities.members(kind) if member.name == kind.tag)
        return {"type": "object", "properties": {kind.tag: self._member(tag, {})}, "required": [kind.tag],
                "allOf": rules, "x-tag": kind.tag}

    def _flat(self, kind: Object, branch: Branch | None, title: str) -> dict[str, Any]:
        """The schema of an object with all its members, in the order in which they are checked."""
        members = list(self._entities.members(kind))
        overrides: dict[str, Any] = {}
        if branch is not None:
            added = self._entities.types[branch.type]
            assert isinstance(added, Object)
            members += self._entities.members(added)
            overrides = branch.defaults
        properties = {member.name: self._member(member, overrides) for member in members}
        required = [member.name for member in members if not member.optional]
        return {"title": title} | _object_schema(properties, required)

    def _member(self, member: Member, overrides: dict[str, Any]) -> dict[str, Any]:
        schema = self._reference(member.type)
        if member.accepts_bool:
            values = self._defs[schema["$ref"].rpartition("/")[2]]["enum"]
            schema = {"type": ["string", "boolean"], "enum": [*values, True, False], "x-qapi": member.type}
            schema["x-accepts-bool"] = True
        schema = schema | _doc(member.doc)
        default = overrides.get(member.name, member.default)
        if default is not MISSING:
            schema["default"] = default_value(self._entities, member.type, default)
        qom = {"type": member.qom_type, "description": member.qom_description}
        if any(qom.values()):
            schema["x-qom"] = {key: text for key, text in qom.items() if text}
        return schema | _features(member.features)


def _doc(text: str | None) -> dict[str, Any]:
    return {"description": " ".join(text.split())} if text else {}


def _features(features: tuple[Feature, ...]) -> dict[str, Any]:
    names = [feature.name for feature in features]
    entry: dict[str, Any] = {"deprecated": True} if "deprecated" in names else {}
    return entry | ({"x-features": names} if names else {})


def _builtin(name: str) -> dict[str, Any]:
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        return {"type": "integer", "minimum": low, "maximum": high, "x-qapi": name}
    return ({} if name == "any" else {"type": BUILTINS[name]}) | {"x-qapi": name}


def _enum(kind: Enum) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "enum": [value.name for value in kind.values], "x-qapi": kind.name}
    docs = {value.name: " ".join(value.doc.split()) for value in kind.values if value.doc}
    unstable = [v.name for v in kind.values if any(feature.name == "unstable" for feature in v.features)]
    if docs:
        schema["x-values"] = docs
    if unstable:
        schema["x-unstable-values"] = unstable
    return schema


def _object_schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return schema | {"additionalProperties": False}
