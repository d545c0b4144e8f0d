"""QEMU's input visitor in small: what it reads, without defaults, or the sentence it answers.

Written from the QAPI entities and the reference alone, it shares nothing with gmemd.schema.validate: it reads neither
qom.json nor JSON Schema, so that agreement of the two means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gmemd.qapi.entities import Alternate, Array, Builtin, Entities, Enum, Member, Object
from gmemd.qmp.encode import member_order
from gmemd.qmp.ghashtable import first_unexpected


class Fault(Exception):
    """The sentence QEMU would answer."""


class Visitor:
    def __init__(self, entities: Entities, *, reject_unstable: bool = False) -> None:
        self.entities = entities
        self.reject_unstable = reject_unstable

    def command(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        arg = self.entities.commands[name].arg
        return self.object(self.entities.types[arg or "q_empty"], arguments, "")

    def object(self, kind: Any, value: Any, path: str) -> dict[str, Any]:
        assert isinstance(kind, Object)
        if not isinstance(value, dict):
            raise Fault(f"Invalid parameter type for '{path}', expected: object")
        prefix = f"{path}." if path else ""
        declared = list(self.entities.members(kind))
        read = self.members(declared, value, prefix)
        if kind.tag:
            (branch,) = (b for b in self.entities.branches(kind) if b.name == value[kind.tag])
            added = self.entities.types[branch.type]
            assert isinstance(added, Object)
            read |= self.members(self.entities.members(added), value, prefix)
            declared += self.entities.members(added)
        left = first_unexpected(member_order(value), [member.name for member in declared])
        if left is not None:
            raise Fault(f"Parameter '{prefix}{left}' is unexpected")
        return read

    def members(self, members: Sequence[Member], value: dict[str, Any], prefix: str) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for member in members:
            if member.name not in value:
                if not member.optional:
                    raise Fault(f"Parameter '{prefix}{member.name}' is missing")
                continue
            if self.reject_unstable and any(feature.name == "unstable" for feature in member.features):
                raise Fault(f"Unstable parameter {member.name} disabled by policy")
            given = value[member.name]
            if member.accepts_bool and isinstance(given, bool):
                given = "on" if given else "off"
            read[member.name] = self.value(member.type, given, prefix + member.name, member.name)
        return read

    def value(self, reference: str, value: Any, path: str, name: str) -> Any:
        kind = self.entities.type(reference)
        if isinstance(kind, Array):
            if not isinstance(value, list):
                raise Fault(f"Invalid parameter type for '{path}', expected: array")
            return [self.value(kind.element, item, f"{path}[{index}]", "null") for index, item in enumerate(value)]
        elif isinstance(kind, Enum):
            if not isinstance(value, str):
                raise Fault(f"Invalid parameter type for '{path}', expected: string")
            if value not in [item.name for item in kind.values]:
                raise Fault(f"Parameter '{name}' does not accept value '{value}'")
            return value
        elif isinstance(kind, Object):
            return self.object(kind, value, path)
        assert not isinstance(kind, Alternate)
        self.builtin(kind, value, path, name)
        return value % 2**64 if kind.name in ("size", "uint64", "uint32", "uint16") else value

    def builtin(self, kind: Builtin, value: Any, path: str, name: str) -> None:
        integer = isinstance(value, int) and not isinstance(value, bool)
        match kind.name:
            case "any":
                return
            case "str" if not isinstance(value, str):
                raise Fault(f"Invalid parameter type for '{path}', expected: string")
            case "bool" if not isinstance(value, bool):
                raise Fault(f"Invalid parameter type for '{path}', expected: boolean")
            case "int" if not integer or not -(2**63) <= value < 2**63:
                raise Fault(f"Invalid parameter type for '{path}', expected: integer")
            case "size" | "uint64" | "uint32" | "uint16":
                if not integer or not -(2**63) <= value < 2**64:
                    raise Fault(f"Parameter '{path}' expects uint64")
                bits = {"uint32": 32, "uint16": 16}.get(kind.name, 64)
                if value % 2**64 >= 2**bits:
                    raise Fault(f"Parameter '{name}' expects {kind.name}_t")
