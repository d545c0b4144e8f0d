"""The QAPI compiler: a schema directory → entities.

`load` reads QAPI's own language as QEMU's compiler does and refuses what it refuses; it also reads the
`qapi/` directory of a QEMU source tree unchanged.
Entities are in the order in which QEMU visits them: module by module, modules in order of first mention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmemd.qapi.checks import check_entities
from gmemd.qapi.entities import (
    BUILTINS,
    EMPTY,
    MISSING,
    Alternate,
    Branch,
    Builtin,
    Command,
    Definition,
    Entities,
    Enum,
    EnumValue,
    Event,
    Feature,
    Member,
    Object,
)
from gmemd.qapi.rules import check_expression, kind_of
from gmemd.qapi.text import Expression, Source, read_file
from gmemd.qapi.tokens import QapiError, Where

__all__ = ["QapiError", "load", "main_file"]


def main_file(path: Path) -> Path:
    """The file to begin with: `path` itself, or qapi-schema.json in it or in its directory qapi."""
    for candidate in (path, path / "qapi-schema.json", path / "qapi" / "qapi-schema.json"):
        if candidate.is_file():
            return candidate
    return path / "qapi-schema.json"


def load(path: Path) -> Entities:
    """Compile the schema at `path` (a file, a qapi directory or a QEMU source tree); raise QapiError."""
    source = Source()
    read_file(main_file(path), source)
    for expression in source.expressions:
        check_expression(expression, source.pragma)
    entities = _Builder(source).build()
    check_entities(entities)
    return entities


class _Builder:
    """Builds entities from checked expressions; refuses a duplicate name."""

    def __init__(self, source: Source) -> None:
        self._source = source
        builtin = Where("builtin", 1)
        self._types: dict[str, Builtin | Enum | Object | Alternate] = {name: Builtin(name, json_type)
                                                                       for name, json_type in BUILTINS.items()}
        qtypes = ("none", "qnull", "qnum", "qstring", "qdict", "qlist", "qbool")
        self._types["QType"] = Enum("QType", builtin, "", values=tuple(map(EnumValue, qtypes)))
        self._types[EMPTY] = Object(EMPTY, builtin, "", implicit=True)
        self._defined: dict[str, Where] = dict.fromkeys(self._types, builtin)

    def build(self) -> Entities:
        made = [self._definition(expression) for expression in self._source.expressions]
        rank = {module: index for index, module in enumerate(self._source.modules)}
        visited = sorted(made, key=lambda entity: rank[entity.module])
        return Entities(self._source.pragma, self._types,
                        {entity.name: entity for entity in visited if isinstance(entity, Command)},
                        {entity.name: entity for entity in visited if isinstance(entity, Event)}, visited,
                        self._source.free_docs, self._source.modules)

    def _definition(self, expression: Expression) -> Definition:
        kind, value, where = kind_of(expression), expression.value, expression.where
        name = value[kind]
        if name in self._defined:
            raise QapiError(where, f"'{name}' is already defined at {self._defined[name]}")
        self._defined[name] = where
        made = self._made(kind, expression, {
            "name": name, "where": where, "module": expression.module, "condition": value.get("if"),
            "features": _features(value), "doc": expression.doc})
        if isinstance(made, Enum | Object | Alternate):
            self._types[name] = made
        return made

    def _made(self, kind: str, expression: Expression, common: dict[str, Any]) -> Definition:
        """The definition; `common` is what those of all kinds have."""
        value = expression.value
        data: Any = value.get("data")
        match kind:
            case "enum":
                return Enum(**common, values=_values(data, expression))
            case "struct":
                return Object(**common, base=value.get("base"), members=_members(data, expression))
            case "union":
                base = self._named("base", value["base"], expression, common)
                return Object(**common, base=base, tag=value["discriminator"], branches=_branches(data))
            case "alternate":
                return Alternate(**common, branches=_branches(data))
        arg, boxed = self._named("arg", data, expression, common), value.get("boxed", False)
        if kind == "event":
            return Event(**common, arg=arg, boxed=boxed)
        returns = value.get("returns")
        return Command(**common, arg=arg, returns=None if returns is None else _reference(returns), boxed=boxed,
                       allow_oob=value.get("allow-oob", False), gen=value.get("gen", True),
                       reads_only=value.get("reads-only", False), role=value.get("role"))

    def _named(self, role: str, data: Any, expression: Expression, common: dict[str, Any]) -> str | None:
        """The name of a type that may be written inside the definition; None: there is none, or it has no members."""
        if not isinstance(data, dict):
            name: str | None = data
            return name
        if not data:
            return None
        name = f"q_obj_{common['name']}-{role}"
        inner = {**common, "name": name, "features": ()}
        self._types[name] = Object(**inner, members=_members(data, expression), implicit=True)
        return name


def _features(value: dict[str, Any]) -> tuple[Feature, ...]:
    return tuple(Feature(item["name"], item.get("if")) for item in value.get("features", ()))


def _reference(value: str | list[str]) -> str:
    return f"[{value[0]}]" if isinstance(value, list) else value


def _values(data: list[dict[str, Any]], expression: Expression) -> tuple[EnumValue, ...]:
    described = expression.doc.members if expression.doc else {}
    return tuple(EnumValue(item["name"], item.get("if"), _features(item), described.get(item["name"]))
                 for item in data)


def _members(data: dict[str, Any], expression: Expression) -> tuple[Member, ...]:
    described = expression.doc.members if expression.doc else {}
    return tuple(_member(key, value, expression.where, described) for key, value in data.items())


def _member(key: str, value: dict[str, Any], where: Where, described: dict[str, str]) -> Member:
    name = key.removeprefix("*")
    qom = value.get("qom", {})
    return Member(name, _reference(value["type"]), where, optional=key != name, condition=value.get("if"),
                  features=_features(value), doc=described.get(name), default=value.get("default", MISSING),
                  accepts_bool=value.get("accepts-bool", False), qom_type=qom.get("type"),
                  qom_description=qom.get("description"))


def _branches(data: dict[str, Any]) -> tuple[Branch, ...]:
    return tuple(Branch(name, _reference(item["type"]), item.get("if"), item.get("defaults", {}))
                 for name, item in data.items())
