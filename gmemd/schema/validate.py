"""Check and complete the arguments of commands by qom.json, in QEMU's words.

"Accept fast, explain slowly": arguments go to closures made from qom.json (accept.py), one shape for each command and,
for object-add, one for each qom-type; what they do not accept goes to explain.py, which judges it and has QEMU's
sentences.
Nothing but qom.json is read at start; reference qmp.md sections 6 to 8.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.schema.accept import Shape, Shapes
from gmemd.schema.explain import Judge

_HERE: Final = os.path.dirname(__file__)
OBJECT_ADD: Final = "object-add"


class Property(NamedTuple):
    """A declared member of an object type, as object-add takes it."""

    name: str
    type: str  # 'size', 'bool', 'str', 'uint32', '[uint16]', 'HostMemPolicy', 'OnOffAuto', ...
    default: Any  # None: it has none
    required: bool
    features: tuple[str, ...]
    doc: str
    qom_type: str  # as shown by qom-list: 'int', 'bool', 'string', 'HostMemPolicy', 'link<thread-context>', ...
    description: str | None  # as shown by qom-list-properties


class Schema:
    """All commands and object types; created by `load`."""

    def __init__(self, document: dict[str, Any], *, unstable_input: str = "accept", lab: bool = False) -> None:
        self.document = document  # qom.json as it is
        self._reject_unstable = unstable_input == "reject"
        self.shapes = Shapes(document, reject_unstable=self._reject_unstable)
        commands = document["x-commands"]
        self.commands: Mapping[str, Command] = MappingProxyType(
            {name: Command(self, name, entry) for name, entry in commands.items()
             if lab or "lab" not in entry.get("x-features", ())}
        )
        self.reading = frozenset(name for name, command in self.commands.items() if command.reads_only)
        self.events: tuple[str, ...] = tuple(document["x-events"])
        union = document["$defs"][commands[OBJECT_ADD]["arguments"]]
        tag = union["properties"][union["x-tag"]]
        self.object_types: tuple[str, ...] = tuple(self._resolve(tag)["enum"])
        self._properties: dict[str, Mapping[str, Property]] = {}
        self._object_add = self.commands[OBJECT_ADD]
        self.judge = Judge(self.shapes)  # the slow path

    @classmethod
    def load(cls, document: str = "qom.json", *, unstable_input: str = "accept", lab: bool = False) -> Schema:
        """Read a derived document, qom.json or the emulator's emulator.json.

        With `unstable_input` "reject", unstable members are refused. Without `lab`, the fault lab's commands do not
        exist.
        """
        if unstable_input not in ("accept", "reject"):
            raise ValueError(f"unstable_input must be accept or reject, not {unstable_input}")
        with open(os.path.join(_HERE, document), encoding="utf-8") as file:
            return cls(json.load(file), unstable_input=unstable_input, lab=lab)

    def check_object(self, properties: dict[str, Any]) -> dict[str, Any]:
        """Check the arguments of object-add and return them completed; raise QmpError."""
        return self._object_add.check(properties)

    def check_property(self, qom_type: str, name: str, value: Any) -> Any:
        """Check one property's value as qom-set takes it and return it normalized; raise QmpError.

        KeyError if the type has no such property.
        """
        shape = self._shape_of_type(qom_type)
        if shape.accepts_member(name, value):
            return value
        return self.judge.property(shape.key, name, value)

    def properties(self, qom_type: str) -> Mapping[str, Property]:
        """The declared members of an object type in schema order, including qom-type and id."""
        found = self._properties.get(qom_type)
        if found is None:
            shape = self._shape_of_type(qom_type)
            found = MappingProxyType({name: self._property(name, shape) for name in shape.properties})
            self._properties[qom_type] = found
        return found

    def set_defaults(self, **defaults: Any) -> None:
        """Change the defaults of members of object types, before the first check."""
        for key, definition in self.document["$defs"].items():
            if key.startswith(f"{self._object_add.arguments}:"):
                for name in defaults.keys() & definition["properties"].keys():
                    definition["properties"][name]["default"] = defaults[name]

    def introspection(self) -> list[dict[str, Any]]:
        """The answer of query-qmp-schema."""
        answer: list[dict[str, Any]] = self.document["x-introspection"]
        return [entity for entity in answer if entity["meta-type"] != "command" or entity["name"] in self.commands]

    def _shape_of_type(self, qom_type: str) -> Shape:
        return self.shapes.shape(f"{self._object_add.arguments}:{qom_type}")

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        reference = schema.get("$ref")
        if reference is None:
            return schema
        found: dict[str, Any] = self.document["$defs"][reference.rpartition("/")[2]]
        return found

    def _property(self, name: str, shape: Shape) -> Property:
        schema = shape.properties[name]
        kind = self._resolve(schema)
        qapi = schema.get("x-qapi") or kind["x-qapi"]
        qom = schema.get("x-qom", {})
        return Property(name, qapi, schema.get("default"), name in shape.required, tuple(schema.get("x-features", ())),
                        schema.get("description", ""),
                        qom.get("type") or (_QOM_TYPES.get(qapi, "int") if qapi in _SCALARS else qapi),
                        qom.get("description"))


_QOM_TYPES: Final = {"str": "string", "bool": "bool"}  # the other scalars are int
_SCALARS: Final = frozenset(("str", "bool", "size", "uint64", "uint32", "uint16", "int"))


class Command:
    """A command of the schema."""

    __slots__ = ("_cases", "_needs_nothing", "_schema", "_shape", "_tag", "_takes_all", "allow_oob", "arguments",
                 "features", "name", "reads_only", "role")

    def __init__(self, schema: Schema, name: str, entry: dict[str, Any]) -> None:
        self.name = name
        self.allow_oob: bool = entry.get("allow-oob", False)
        self.reads_only: bool = entry.get("reads-only", False)
        self.role: str = entry.get("role", "admin")  # the least that may use it under a policy
        self.features: tuple[str, ...] = tuple(entry.get("x-features", ()))
        self.arguments: str = entry["arguments"]  # the name in $defs of their schema
        self._schema = schema
        definition = schema.document["$defs"][self.arguments]
        self._tag: str | None = definition.get("x-tag")
        self._takes_all: bool = definition.get("additionalProperties", False)  # and checks it itself ('gen': false)
        self._shape: Shape | None = None
        self._needs_nothing = False  # without arguments it is complete, as far as is known
        self._cases: dict[str, Shape] = {}  # by the tag

    @property
    def is_forbidden(self) -> bool:
        """Whether the input policy forbids the command."""
        return self._schema._reject_unstable and "unstable" in self.features

    def check_policy(self) -> None:
        """Raise CommandNotFound if the input policy forbids the command."""
        if self.is_forbidden:
            raise QmpError(f"Unstable command {self.name} disabled by policy", COMMAND_NOT_FOUND)

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments completed: defaults filled in, wrapped and normalized; QmpError if they are wrong.

        The given dict is not changed. Absent members without a default stay absent.
        """
        if not arguments and self._needs_nothing:
            return {}
        shape = self._shape
        if shape is None:
            try:
                shape = self._cases[arguments[self._tag]]  # type: ignore[index]  # without a tag it is not found
            except (KeyError, TypeError):
                shape = self._find_shape(arguments)
        if shape is not None and shape.accepts(arguments):
            defaults = shape.defaults
            return {**defaults, **arguments} if defaults else arguments.copy()
        if self._takes_all:
            return arguments.copy()
        return self._schema.judge.check(self.arguments, arguments, shape)

    def _find_shape(self, arguments: dict[str, Any]) -> Shape | None:
        """The shape to check against: the only one, or the one that the tag selects; None: there is none."""
        if self._takes_all:
            return None
        if self._tag is None:
            self._shape = shape = self._schema.shapes.shape(self.arguments)
            self._needs_nothing = not (shape.required or shape.defaults)
            return shape
        case = arguments.get(self._tag)
        if type(case) is not str:
            return None
        found = self._cases.get(case)
        if found is None:
            key = f"{self.arguments}:{case}"
            if key in self._schema.document["$defs"]:
                found = self._cases[case] = self._schema.shapes.shape(key)
        return found
