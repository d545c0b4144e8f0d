"""query-qmp-schema: entities → the flat list of SchemaInfo, encoded as QEMU encodes it.

Commands and events first, then types as they are reached; names of types are masked as decimal strings,
numbered by first use; every integer type is `int`; bases are flattened in (reference qmp.md section 13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gmemd.qapi.entities import (
    EMPTY,
    Alternate,
    Array,
    Builtin,
    Command,
    Entities,
    Enum,
    Event,
    Feature,
    Member,
    Object,
    Type,
)

Config = Callable[[str], bool]


def holds(condition: Any, config: Config) -> bool:
    """Whether an `if` is true; `config` says which symbols are defined."""
    if condition is None:
        return True
    if isinstance(condition, str):
        return config(condition)
    if "not" in condition:
        return not holds(condition["not"], config)
    if "all" in condition:
        return all(holds(part, config) for part in condition["all"])
    return any(holds(part, config) for part in condition["any"])


def introspect(entities: Entities, *, config: Config | None = None, mask: bool = True) -> list[dict[str, Any]]:
    """The SchemaInfo list; parts whose condition is false under `config` are left out (None: none are).

    With `mask` false types keep their names. Numbers count conditional parts, as in QEMU.
    """
    return _Introspection(entities, config, mask).run()


class _Introspection:
    def __init__(self, entities: Entities, config: Config | None, mask: bool) -> None:
        self._entities = entities
        self._config = config
        self._mask = mask
        self._numbers: dict[str, str] = {}
        self._used: dict[str, Type] = {}  # in order of first use

    def run(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for entity in self._entities.visited:
            if isinstance(entity, Command):
                self._keep(found, entity.condition, self._command(entity))
            elif isinstance(entity, Event):
                self._keep(found, entity.condition, self._event(entity))
        done = 0
        while done < len(self._used):
            reached = list(self._used.values())[done:]
            for kind in reached:
                self._keep(found, kind.condition, self._type(kind))
            done += len(reached)
        return found

    def _keep(self, found: list[dict[str, Any]], condition: Any, info: dict[str, Any]) -> None:
        if self._has(condition):
            found.append(info)

    # -- names

    def _name(self, name: str) -> str:
        if not self._mask:
            return name
        return self._numbers.setdefault(name, str(len(self._numbers)))

    def _use(self, reference: str) -> str:
        kind = self._entities.type(reference)
        element = self._entities.type(kind.element) if isinstance(kind, Array) else kind
        if isinstance(element, Builtin) and element.json_type == "int":
            kind = self._entities.type("int" if element is kind else "[int]")
        self._used.setdefault(kind.name, kind)
        if isinstance(kind, Builtin):
            return kind.name
        if isinstance(kind, Array):
            return f"[{self._use(kind.element)}]"
        return self._name(kind.name)

    # -- entries

    def _command(self, entity: Command) -> dict[str, Any]:
        info: dict[str, Any] = {"name": entity.name, "meta-type": "command", "arg-type": self._use(entity.arg or EMPTY),
                                "ret-type": self._use(entity.returns or EMPTY)}
        if entity.allow_oob:
            info["allow-oob"] = True
        return self._with_features(info, entity.features)

    def _event(self, entity: Event) -> dict[str, Any]:
        info = {"name": entity.name, "meta-type": "event", "arg-type": self._use(entity.arg or EMPTY)}
        return self._with_features(info, entity.features)

    def _type(self, kind: Type) -> dict[str, Any]:
        if isinstance(kind, Builtin):
            return {"name": kind.name, "meta-type": "builtin", "json-type": kind.json_type}
        if isinstance(kind, Array):
            element = self._use(kind.element)
            return {"name": f"[{element}]", "meta-type": "array", "element-type": element}
        if isinstance(kind, Enum):
            return self._enum(kind)
        if isinstance(kind, Alternate):
            members = [{"type": self._use(b.type)} for b in kind.branches if self._has(b.condition)]
            info = {"name": self._name(kind.name), "meta-type": "alternate", "members": members}
            return self._with_features(info, kind.features)
        return self._object(kind)

    def _enum(self, kind: Enum) -> dict[str, Any]:
        values = [value for value in kind.values if self._has(value.condition)]
        info = {"name": self._name(kind.name), "meta-type": "enum",
                "members": [self._with_features({"name": v.name}, v.features) for v in values],
                "values": [value.name for value in values]}
        return self._with_features(info, kind.features)

    def _object(self, kind: Object) -> dict[str, Any]:
        members = [(member, self._member(member)) for member in self._entities.members(kind)]  # used even if left out
        info: dict[str, Any] = {"name": self._name(kind.name), "meta-type": "object",
                                "members": [entry for member, entry in members if self._has(member.condition)]}
        if kind.tag is not None:
            variants = [(b, {"case": b.name, "type": self._use(b.type)}) for b in self._entities.branches(kind)]
            info["tag"] = kind.tag
            info["variants"] = [entry for branch, entry in variants if self._has(branch.condition)]
        return self._with_features(info, kind.features)

    def _member(self, member: Member) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": member.name, "type": self._use(member.type)}
        if member.optional:
            entry["default"] = None
        return self._with_features(entry, member.features)

    def _has(self, condition: Any) -> bool:
        return self._config is None or holds(condition, self._config)

    def _with_features(self, info: dict[str, Any], features: tuple[Feature, ...]) -> dict[str, Any]:
        names = [feature.name for feature in features if self._has(feature.condition)]
        if names:
            info["features"] = names
        return info
