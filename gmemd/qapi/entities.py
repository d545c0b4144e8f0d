"""What a QAPI schema defines, as plain data.

Entities name types by reference: "X" or "[X]" (a list of X); `Entities.type` resolves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from gmemd.qapi.doc import Doc
from gmemd.qapi.tokens import Pragma, Where

MISSING: Final = object()
Condition = str | dict[str, Any] | None

# name: JSON type
BUILTINS: Final = {
    **{"str": "string", "number": "number", "bool": "boolean", "any": "value", "null": "null"},
    **dict.fromkeys(("int", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "size"), "int"),
}


@dataclass(frozen=True)
class Feature:
    name: str
    condition: Condition = None


@dataclass(frozen=True)
class Member:
    """A member of an object; `default`, `accepts_bool`, `qom_*` are gmemd's extensions."""

    name: str
    type: str
    where: Where
    optional: bool = False
    condition: Condition = None
    features: tuple[Feature, ...] = ()
    doc: str | None = None
    default: Any = MISSING
    accepts_bool: bool = False
    qom_type: str | None = None
    qom_description: str | None = None


@dataclass(frozen=True)
class EnumValue:
    name: str
    condition: Condition = None
    features: tuple[Feature, ...] = ()
    doc: str | None = None


@dataclass(frozen=True)
class Branch:
    """One case of a union, or one type of an alternate; `defaults` is gmemd's extension."""

    name: str
    type: str
    condition: Condition = None
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Builtin:
    name: str
    json_type: str
    condition: Condition = None


@dataclass(frozen=True)
class Array:
    name: str
    element: str
    condition: Condition = None


@dataclass(frozen=True)
class Definition:
    name: str
    where: Where
    module: str
    condition: Condition = None
    features: tuple[Feature, ...] = ()
    doc: Doc | None = None

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return type(self).__name__

    @property
    def summary(self) -> str:
        """The first sentence of its documentation."""
        return self.doc.summary if self.doc else ""


@dataclass(frozen=True)
class Enum(Definition):
    values: tuple[EnumValue, ...] = ()


@dataclass(frozen=True)
class Object(Definition):
    """A struct or union; `implicit` ones are written inside another definition."""

    base: str | None = None
    members: tuple[Member, ...] = ()  # own ones, without the base's
    tag: str | None = None
    branches: tuple[Branch, ...] = ()
    implicit: bool = False

    @property
    def kind(self) -> str:
        return "Union" if self.tag else "Struct"


@dataclass(frozen=True)
class Alternate(Definition):
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class Command(Definition):
    """`reads_only` and `role` are gmemd's extensions."""

    arg: str | None = None
    returns: str | None = None
    boxed: bool = False
    allow_oob: bool = False
    gen: bool = True
    reads_only: bool = False
    role: str | None = None  # the least that may use it


@dataclass(frozen=True)
class Event(Definition):
    arg: str | None = None
    boxed: bool = False


Type = Builtin | Array | Enum | Object | Alternate
EMPTY: Final = "q_empty"


@dataclass
class Entities:
    """Everything a schema defines."""

    pragma: Pragma
    types: dict[str, Builtin | Enum | Object | Alternate]
    commands: dict[str, Command]
    events: dict[str, Event]
    visited: list[Definition]  # what was written, in QEMU's order
    free_docs: list[tuple[str, Doc]]  # module, text
    modules: list[str]

    def type(self, reference: str) -> Type:
        """Resolve "X" or "[X]"; KeyError if there is no X."""
        if reference.startswith("["):
            element = self.types[reference[1:-1]]
            return Array(reference, element.name, element.condition)
        return self.types[reference]

    def members(self, owner: Object) -> tuple[Member, ...]:
        """All members that every such object may have, the base's first."""
        if owner.base is None:
            return owner.members
        base = self.types[owner.base]
        assert isinstance(base, Object)
        return (*self.members(base), *owner.members)

    def branches(self, owner: Object) -> tuple[Branch, ...]:
        """All cases of a union: those written, then the enum's other values, which add no members."""
        if owner.tag is None:
            return ()
        written = {branch.name for branch in owner.branches}
        tag = self.tag_type(owner)
        rest = (Branch(v.name, EMPTY, v.condition) for v in tag.values if v.name not in written)
        return (*owner.branches, *rest)

    def tag_type(self, owner: Object) -> Enum:
        """The enum type of the member that decides between the branches of a union."""
        (member,) = (member for member in self.members(owner) if member.name == owner.tag)
        tag = self.type(member.type)
        assert isinstance(tag, Enum)
        return tag
