"""A server's query-qmp-schema, from the point of view of a command line.

A type's name means nothing on the wire (it is a number); `Introspection` resolves names.
The forms of the entries: reference qmp.md section 13, QEMU's docs/devel/qapi-code-gen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Entry = dict[str, Any]  # one SchemaInfo


class Member(NamedTuple):
    """One argument of a command, or one member of an object."""

    name: str
    type: str  # name of the type's entry
    optional: bool
    features: tuple[str, ...]


class Introspection:
    """The commands and events of a server and the types of their arguments."""

    def __init__(self, schema: list[Entry]) -> None:
        """`schema` is the value of query-qmp-schema."""
        self._entries = {entry["name"]: entry for entry in schema}

    def names(self, meta_type: str) -> list[str]:
        """Return the names of all commands ("command") or events ("event"), sorted."""
        return sorted(name for name, entry in self._entries.items() if entry["meta-type"] == meta_type)

    def entry(self, name: str) -> Entry:
        """Return a type's, command's or event's entry; {} if there is none."""
        return self._entries.get(name, {})

    def members(self, command: str, arguments: Mapping[str, Any] | None = None) -> list[Member]:
        """Return the arguments of a command; of the variants, the one that `arguments` select."""
        return self.object_members(self.entry(command).get("arg-type", ""), arguments or {})

    def object_members(self, type_name: str, value: Mapping[str, Any]) -> list[Member]:
        """Return the members of an object type; of its variants, the one that `value` selects."""
        entry = self.entry(type_name)
        if entry.get("meta-type") != "object":
            return []
        found = [Member(info["name"], info["type"], "default" in info, tuple(info.get("features", ())))
                 for info in entry["members"]]
        for variant in entry.get("variants", ()):
            if variant["case"] == value.get(entry["tag"]):
                found += self.object_members(variant["type"], value)
        return found

    def member(self, command: str, name: str, arguments: Mapping[str, Any]) -> Member | None:
        """Return one member by its name."""
        return next((member for member in self.members(command, arguments) if member.name == name), None)

    def cases_with(self, command: str, name: str) -> list[str]:
        """Return the variants of a command's arguments that have a member with that name."""
        entry = self.entry(self.entry(command).get("arg-type", ""))
        return [variant["case"] for variant in entry.get("variants", ())
                if any(member.name == name for member in self.object_members(variant["type"], {}))]

    def values(self, type_name: str) -> list[str]:
        """Return the values of an enum, even inside an alternate or an array; [] for other types."""
        entry = self.entry(type_name)
        if entry.get("meta-type") == "enum":
            # "members" since QEMU 7.0; "values", without features, before
            return [info["name"] for info in entry["members"]] if "members" in entry else list(entry["values"])
        return [value for inner in self.parts(type_name) for value in self.values(inner)]

    def parts(self, type_name: str) -> list[str]:
        """Return the types of an alternate, or of an array's elements; [] for other types."""
        entry = self.entry(type_name)
        if entry.get("meta-type") == "array":
            return [entry["element-type"]]
        if entry.get("meta-type") == "alternate":
            return [info["type"] for info in entry["members"]]
        return []

    def describe(self, type_name: str) -> str:
        """Return a type in a few words: int, bool, auto|on|off, [str], {name, value}."""
        entry = self.entry(type_name)
        kind = entry.get("meta-type")
        if kind == "enum":
            return "|".join(self.values(type_name))
        if kind == "array":
            return f"[{self.describe(entry['element-type'])}]"
        if kind == "alternate":
            return " or ".join(self.describe(part) for part in self.parts(type_name))
        if kind == "object":
            names = (member.name + "?" * member.optional for member in self.object_members(type_name, {}))
            return "{" + ", ".join(names) + "}"
        return type_name

    def result_members(self, command: str) -> list[str]:
        """Return the member names of the objects that a command returns, in the order of declaration."""
        type_name = self.entry(command).get("ret-type", "")
        return [member.name for part in (*self.parts(type_name), type_name) for member in self.object_members(part, {})]
